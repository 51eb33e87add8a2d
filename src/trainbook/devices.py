"""Which cards a build of torch has kernels for. Needs no torch."""

# Only the CUDA 12.6 wheels still hold kernels for Pascal (6.x) and Volta (7.0): P100, V100.
KERNELS_REMEDY = "install the CUDA 12.6 build of torch and torchvision (the cu126 channel on pytorch.org), or take a T4 or newer"


def kernels_missing(capability: tuple[int, int], architectures: list[str]) -> str:
    """Why a wheel cannot run on a device, or "" when it can.

    A wheel holds binary kernels (sm_XY, which also run on later minor versions of the same major one) and maybe
    portable code (compute_XY, which the driver translates for any later device).

    Args:
        capability: of the device, (major, minor).
        architectures: from `torch.cuda.get_arch_list()`.
    """
    parts = [(kind, digits) for kind, digits in map(_split_architecture, architectures) if kind in ("sm", "compute")]
    if not parts:  # not a build for NVIDIA's cards
        return ""
    numbers = [(kind, int(digits[:-1]), int(digits[-1])) for kind, digits in parts]
    binary = any(kind == "sm" and major == capability[0] and minor <= capability[1] for kind, major, minor in numbers)
    portable = any(kind == "compute" and (major, minor) <= capability for kind, major, minor in numbers)
    if binary or portable:
        return ""
    return f"compute capability {capability[0]}.{capability[1]}, but this torch has kernels for {', '.join(architectures)} only"


def _split_architecture(name: str) -> tuple[str, str]:
    kind, _, digits = name.partition("_")
    return kind, "".join(character for character in digits if character.isdigit())  # sm_90a counts as 9.0
