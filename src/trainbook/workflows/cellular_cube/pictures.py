"""The pictures that show whether the cube carries vectors, where in it, and what the vectors still mean behind it."""

from typing import Any

import torch
from matplotlib.figure import Figure

from trainbook.plots import baseline_bars
from trainbook.state import TrainState
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.data import SentenceData
from trainbook.workflows.cellular_cube.evaluation import decoded
from trainbook.workflows.cellular_cube.figures import (
    draw_corpus,
    draw_examples,
    draw_flow,
    draw_gate,
    draw_planes,
    draw_similarity,
    draw_spectrum,
    draw_table,
)
from trainbook.workflows.cellular_cube.flow import cell_sensitivity, lesion_curve, saliency_path
from trainbook.workflows.cellular_cube.observation import num_watched, observe
from trainbook.workflows.cellular_cube.principal import fit_principal
from trainbook.workflows.cellular_cube.training import reconstruct

NUM_EXAMPLES = 8
BARS = ("fvu", "cosine", "centred_cosine", "rsa", "retrieved_label_match", "label_accuracy")
LESION_NUMBERS = 10**5  # of states in a pass of the lesion curve, which takes side (side - 1) passes
MAX_LESION_SIDE = 12  # beyond it only the sensitivity is drawn
TITLES = {"retrieved": "nearest known sentence of each vector", "written": "sentence written by the decoder for each vector"}


def draw_data(config: Config, data: SentenceData) -> dict[str, Figure]:
    """Sentences with their labels; lengths, labels and the teacher's spectrum."""
    train = data.train
    rows = [[data.sentences["train"][row], data.label_names[int(train["labels"][row])]] for row in range(NUM_EXAMPLES)]
    return {
        "sentences": draw_table(rows, ["training sentence", "label"], f"corpus: {config.corpus}, teacher: {config.teacher}"),
        "corpus": draw_corpus(
            data.sentences["train"], train["labels"], data.label_names, fit_principal(train["embeddings"]).variances
        ),
    }


def draw(config: Config, data: SentenceData, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Planes over time, gate by depth, flow and lesions, similarities, spectrum, decoded examples, and the baselines."""
    network = state.modules["cube"].eval()
    target = data.test["embeddings"]
    watched = target[: num_watched(len(target), config.side, config.channels)]
    observation = observe(network, watched)
    pca = fit_principal(data.train["embeddings"]).reconstructed(target, config.code_size)
    outputs = {"teacher": target, "cube": reconstruct(network, target), "pca": pca}
    few = watched[: max(2, min(len(watched), LESION_NUMBERS // (config.side**3 * config.channels)))]

    def passes(watch: Any) -> torch.Tensor:
        return network(few, watch).vectors

    figures = {"planes": draw_planes(observation.energies), "gate": draw_gate(observation.gate)}
    # Weighed by the state: the norm in front of each expert makes cells that hold next to nothing look sensitive.
    sensitivity = cell_sensitivity(passes, config.seed) * observation.energies.square()
    lesions = lesion_curve(passes, few, config.steps, config.side) if config.side <= MAX_LESION_SIDE else None
    figures["flow"] = draw_flow(sensitivity, lesions, saliency_path(sensitivity))
    figures["similarity"] = draw_similarity(outputs, data.test["labels"], data.label_names)
    figures["spectrum"] = draw_spectrum(outputs, config.code_size)
    for how, sentences in decoded(config, data, state, outputs).items():
        shown = {who: sentences[who] for who in ("teacher", "cube", "pca", "mean_vector")}
        figures[f"examples_{how}"] = draw_examples(shown, data.sentences["test"], NUM_EXAMPLES, TITLES[how])
    measured = {name for key in history[-1] for name in [str(key).rpartition("/")[2]]}
    bars = (*BARS, *(f"{name}_fvu" for name in data.further))
    figures["baselines"] = baseline_bars(history[-1], [name for name in bars if name in measured])
    return figures
