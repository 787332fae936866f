"""One exception family for everything a user can get wrong.

Every message says what was found, what was expected, and what to do (``hint``). ``code`` is stable and can be searched.
"""


class CryorbitError(ValueError):
    """Bad input, told to a person.

    Parameters
    ----------
    code
        Stable identifier, for example ``STAR012``: the family in capitals, then three digits.
    message
        One sentence: what was found and what was expected.
    hint
        What to do about it; empty when there is nothing more to say.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        self.code = code
        self.message = message
        self.hint = hint
        super().__init__(f"{code}: {message}" + (f"\n\nhint: {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type["CryorbitError"], tuple[str, str, str]]:
        """Survive the way back from a worker process."""
        return type(self), (self.code, self.message, self.hint)


class FileError(CryorbitError):
    """A file is missing, unreadable, truncated, or not what its name says (codes ``FILE``, ``MRC``, ``STAR``, ``CS``, ``PKL``)."""


class DataError(CryorbitError):
    """The file reads, but its numbers cannot be used (codes ``DATA``)."""


class ConfigError(CryorbitError):
    """An option or configuration value cannot be used (codes ``CONF``)."""


class RunError(CryorbitError):
    """A run folder cannot be written, resumed or read (codes ``RUN``)."""
