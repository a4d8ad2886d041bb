"""EAH in a model of transformers: one layer's attention swapped, and what that needs to know of the model."""

if __name__ == "transformers":
    raise ImportError(
        f"{__file__} is a part of eah and was imported as transformers: Python looked first in the folder above it; "
        "start from another folder"
    )
