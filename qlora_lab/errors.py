"""The one exception a reader meets: an argument that cannot work, answered in one line.

Every public function checks what it is given at the door and says what was wrong and what is
allowed. Without that, a block size of 48 or a NaN weight would surface three calls later as a
shape error or, worse, as a loss that is quietly too high.
"""


class InputError(ValueError):
    """An argument that this package refuses, with one line that says what is allowed.

    It is a `ValueError`, so code that knows nothing of this package catches it too. The command
    line prints the message and leaves with exit code 2 instead of a traceback.
    """
