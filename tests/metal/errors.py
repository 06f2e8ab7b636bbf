"""What can be wrong with a kernel. Every message begins with the kernel's name."""


class HarnessError(Exception):
    """A kernel does not compile, does not end, or does what it must not."""


class CompileError(HarnessError):
    """The text is not what the language allows."""


class LaunchError(HarnessError):
    """The launch itself is one that devices refuse."""


class DivergedError(HarnessError):
    """A barrier or simd operation is not reached by all its threads alike."""


class MemoryFaultError(HarnessError):
    """An access outside a buffer or array, a write to an input, or arithmetic without a defined result."""


class RaceError(HarnessError):
    """Two threads touch the same memory without a barrier between them."""


class OrderError(HarnessError):
    """The result depends on the order in which threads run."""


class UnwrittenError(HarnessError):
    """An output cell was never written."""
