"""One file per operator: docstring, validation, the torch.ops call, fakes, autograd and vmap."""
