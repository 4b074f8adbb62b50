"""How workers compute, by what their libraries read from the environment when they are loaded."""

from serve.engine import cores


def variables() -> dict[str, str]:
    """Returns those of the zygote and TorchServe alike, unless the server's own environment says otherwise."""
    return {
        # Of OpenMP, MKL and OpenBLAS. By themselves they count the cores, but know of no quota: of half a core on a
        # machine of 64 they would start 64 threads, which then wait for each other.
        "OMP_NUM_THREADS": str(cores.usable()),
        # Workers share the cores: a thread that spins while it waits for its sibling takes it from another worker.
        # Beside one busy process a SAM click took 2.4 s spinning and 0.25 s waiting.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Of OpenBLAS the least that it knows, 2 to the power of 4 cycles. Its threads spin once when they are started,
        # too: a tenth of a second of a core, while the worker is being loaded.
        "OPENBLAS_THREAD_TIMEOUT": "4",
        # glibc asks for huge pages, where the kernel gives them to those that ask: for activations one page fault, and
        # one clearing, for each 2 MB instead of 4 kB. glibc before 2.35, and others, do not know of it.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
