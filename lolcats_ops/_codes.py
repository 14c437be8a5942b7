"""Names of the enumerations of the C ABI, whose index is the code, and what a window kind spans."""

ACTIVATIONS = ("softmax", "exp", "elu1", "relu", "identity", "favor")
TWO_SIDED = ("softmax", "exp")  # activations that may take -z as well
WINDOW_KINDS = ("sliding", "terrace")
DTYPES = ("float32", "bfloat16", "float16", "int32", "int64", "bool")
# activation, two_sided, skip and eps where q and k are the features already
NO_MAP = (ACTIVATIONS.index("identity"), False, False, 0.0)


def window_span(window: int, window_kind: str) -> int:
    """The most keys that a query attends by softmax, sinks aside: w (sliding) or 2w (terrace)."""
    return window if window_kind == "sliding" else 2 * window
