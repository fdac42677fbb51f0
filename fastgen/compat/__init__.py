"""fastgen's flow layers with the constructors, calls, returns and state_dict of other libraries.

`fastgen.compat.nflows`, `.normflows` and `.freia`: change the import of a class and keep the rest of the code. None of
these libraries is needed.
"""
