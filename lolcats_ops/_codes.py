"""Names of the enumerations of the C ABI; a name's index is its code."""

ACTIVATIONS = ("softmax", "exp", "elu1", "relu", "identity", "favor")
TWO_SIDED = ("softmax", "exp")  # activations that may take -z as well
WINDOW_KINDS = ("sliding", "terrace")
DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "bool")
