"""The layer by matrix products of a library, or of the C++ extension, a block of rows at a time."""
