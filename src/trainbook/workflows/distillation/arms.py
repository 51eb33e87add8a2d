"""The arms that are compared: what each kind of student learns from, and how. Needs no torch."""

from dataclasses import dataclass, replace

from trainbook.workflows.distillation.config import Config

DIRECT, KD, KD_LONG, HPM_KD, UNLABELLED = "direct", "kd", "kd_long", "hpm_kd", "kd_unlabelled"
WARM = "hpm_kd_warm_start"
WITHOUT = "hpm_kd_without_"
MULTI_TEACHER, UNIFORM = "multi_teacher", "uniform_teachers"
# Of HPM-KD, in the order of the brief. Without `parallel` nothing but the time is another, so it has no arm.
COMPONENTS = ("chain", "temperature", "multi_teacher", "adaptive", "memory", "parallel")


@dataclass(frozen=True)
class Settings:
    """What the adaptive component may choose.

    Attributes:
        method: a key of `methods.METHODS`.
        temperature: T, and where a law starts.
        weight: a in (1 - a) cross entropy + a T^2 KL; other methods than kd have weights of their own.
        learning_rate, weight_decay: of the optimizer.
    """

    method: str
    temperature: float
    weight: float
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Arm:
    """One kind of student.

    Attributes:
        name: as in the metrics.
        method: a key of `methods.METHODS`; "" learns from labels alone.
        chain: whether assistants stand between.
        law: of the temperature.
        gate: how several teachers are weighted; "" learns from the first alone.
        adaptive: whether settings are searched for.
        live: compute what the teachers say in every step instead of keeping it.
        unlabelled: also learn from the teacher on images without labels.
        long: train as many steps as the whole chain.
        warm: start from the leading channels of the assistant before, where there is one.
    """

    name: str
    method: str = "kd"
    chain: bool = False
    law: str = "constant"
    gate: str = ""
    adaptive: bool = False
    live: bool = False
    unlabelled: bool = False
    long: bool = False
    warm: bool = False


def switches(config: Config) -> dict[str, bool]:
    """Which components of HPM-KD are on."""
    several = config.multi_teacher and config.num_teachers > 1
    on = {"chain": config.chain, "temperature": config.temperature_law != "constant", "multi_teacher": several}
    return {**on, "adaptive": config.adaptive, "memory": config.shared_memory, "parallel": config.parallel_pipeline}


def hpm_kd(config: Config) -> Arm:
    """The arm with every component that is on."""
    on = switches(config)
    return Arm(
        HPM_KD,
        chain=on["chain"],
        law=config.temperature_law,
        gate=config.gate if on["multi_teacher"] else "",
        adaptive=on["adaptive"],
        live=not on["memory"],
    )


def _without(arm: Arm, component: str) -> Arm:
    off = {"chain": {"chain": False}, "temperature": {"law": "constant"}, "multi_teacher": {"gate": ""}}
    off |= {"adaptive": {"adaptive": False}, "memory": {"live": True}}
    return replace(arm, name=WITHOUT + component, **off[component])


def _of_method(name: str) -> Arm:
    gates = {MULTI_TEACHER: "learned", UNIFORM: "uniform"}
    return Arm(name, gate=gates[name]) if name in gates else Arm(name, method=name)


def arms(config: Config, regime: str) -> list[Arm]:
    """The arms of a regime, in the order of the tables."""
    direct, kd, hpm = Arm(DIRECT, method=""), Arm(KD), hpm_kd(config)
    if config.stage == "teacher":
        return []
    if config.stage != "all":
        return [{DIRECT: direct, KD: kd, HPM_KD: hpm}[config.stage]]
    if regime.startswith("without_"):
        return [direct, kd]
    several = [name for name in config.methods if name not in (MULTI_TEACHER, UNIFORM) or config.num_teachers > 1]
    removable = [name for name, on in switches(config).items() if on and name != "parallel"] if config.ablation else []
    return [
        direct,
        kd,
        *([replace(kd, name=KD_LONG, long=True)] if hpm.chain else []),
        hpm,
        *(_without(hpm, name) for name in removable),
        *([replace(hpm, name=WARM, warm=True)] if hpm.chain and config.warm_start else []),
        *map(_of_method, several),
        *([replace(kd, name=UNLABELLED, unlabelled=True)] if config.unlabelled_arm and regime != "all_labels" else []),
    ]


def default_settings(config: Config, arm: Arm) -> Settings:
    """What an arm is trained with where nothing was searched; a method other than kd has its published temperature."""
    from trainbook.workflows.distillation.methods import METHODS

    temperature = config.temperature if arm.method in ("", "kd") else METHODS[arm.method].temperature
    return Settings(arm.method, temperature, config.distillation_weight, config.learning_rate, config.weight_decay)
