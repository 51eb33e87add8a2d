"""Held-out quality of the cube beside the mean, PCA and networks of equal size; what it decodes to; what happens inside."""

# N sentences, D numbers of a vector

import functools

import torch
from torch import Tensor

from trainbook.comparison import ABOVE, interval
from trainbook.state import TrainState
from trainbook.workflows.cellular_cube.baselines import plain_outputs
from trainbook.workflows.cellular_cube.compositionality import compositionality
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.curriculum import shrunk_variances, synthetic_vectors
from trainbook.workflows.cellular_cube.data import SentenceData
from trainbook.workflows.cellular_cube.heads import baseline_outputs
from trainbook.workflows.cellular_cube.information import box_counting_slope
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.observation import inside_measures, layer_similarity, num_watched, observe
from trainbook.workflows.cellular_cube.phrase_scores import PhraseJudge
from trainbook.workflows.cellular_cube.principal import best_linear_fvu, fit_principal
from trainbook.workflows.cellular_cube.probes import probe_table, surface_labels
from trainbook.workflows.cellular_cube.random_features import random_feature_output
from trainbook.workflows.cellular_cube.readout import present_rows
from trainbook.workflows.cellular_cube.readout_fit import fit_readout
from trainbook.workflows.cellular_cube.retrieval import own_sentence_recall, retrieve
from trainbook.workflows.cellular_cube.similarity import norm_summary, reconstruction_quality, similarity_table
from trainbook.workflows.cellular_cube.text_decoder import Vocabulary, write_sentences
from trainbook.workflows.cellular_cube.training import TEXT_DECODER, reconstruct
from trainbook.workflows.cellular_cube.trials import trial_metrics

SYNTHETIC_SENTENCES = 256
MAX_PROBED = 2000  # training sentences whose vectors are passed through the cube for the probes
MAX_DECODED = 300  # test sentences that are decoded to text
LARGER = 1.5  # side of a cube with the same rule, over the trained one's


def evaluate(config: Config, data: SentenceData, state: TrainState) -> dict[str, float]:
    """Metrics named "<who>/<metric>".

    fvu: share of variance unexplained, lower is better, 1 for the mean; cosine, centred_cosine: higher is better.
    "<who>/fvu_above_cube": its FVU less the cube's with a 95 % interval over test sentences. cube/gap_closed: share of the way
    from PCA to the autoencoder of equal size, in FVU; 0 where that autoencoder is no better than PCA. "<who>/<teacher>_fvu" and
    "_cosine" are of a further teacher's vectors, as far as there are any.
    """
    network: CellularCube = state.modules["cube"]
    outputs = test_outputs(config, data, network)
    metrics = _quality(data, outputs) | _further(config, data, network)
    metrics |= _text(config, data, state, outputs)
    metrics |= _probes(config, data, network)
    metrics |= _inside(config, data, network, outputs)
    metrics |= _options(config, data, network)
    metrics["cube/num_parameters"] = float(_size(network))
    metrics["teacher/cache_hit_rate"] = data.cache_hit_rate
    return metrics | trial_metrics(config, data)


def test_outputs(config: Config, data: SentenceData, network: CellularCube) -> dict[str, Tensor]:
    """Who to (N, D), standardised, of the test sentences; the cube first."""
    train, valid, test = (split["embeddings"] for split in (data.train, data.valid, data.test))
    principal = fit_principal(train)
    plain = plain_outputs(config, principal, _size(network), train, valid, test)
    features = network.readout.in_features
    plain["random_features"] = random_feature_output(principal, config.code_size, features, train, valid, test, config.seed)
    if config.fits_readout:
        plain["untrained"] = reconstruct(untrained_cube(config, data, network), test)
    return {"cube": reconstruct(network, test), **plain}


def untrained_cube(config: Config, data: SentenceData, network: CellularCube) -> CellularCube:
    """A cube of the run's seed whose read-out alone was fitted, in closed form: what the experts have to improve on."""
    fresh = _fresh(config, data, network)
    fit_readout(fresh, data.train["embeddings"], data.valid["embeddings"])
    return fresh


def _fresh(config: Config, data: SentenceData, network: CellularCube) -> CellularCube:
    train = data.train["embeddings"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return CellularCube(config, fit_principal(train), network.mean, float(network.scale)).to(train.device).eval()


def _size(network: CellularCube) -> int:
    """Parameters on the way to the main teacher's vectors."""
    return sum(parameter.numel() for name, parameter in network.named_parameters() if not name.startswith("heads."))


def _quality(data: SentenceData, outputs: dict[str, Tensor]) -> dict[str, float]:
    target = data.test["embeddings"]
    metrics: dict[str, float] = {}
    for who, output in outputs.items():
        found = reconstruction_quality(output, target, data.mean, data.scale)
        found["own_sentence_recall"] = own_sentence_recall(data.raw(output), data.raw(target))
        metrics |= {f"{who}/{name}": value for name, value in found.items()}
        if who != "cube":
            metrics |= _above_cube(f"{who}/fvu", output, outputs["cube"], target)
    gap = metrics["pca/fvu"] - metrics["autoencoder/fvu"]
    gained = metrics["pca/fvu"] - metrics["cube/fvu"]
    metrics["cube/gap_closed"] = gained / gap if gap > 0 else 0.0
    metrics |= {f"cube/{name}": value for name, value in norm_summary(outputs["cube"], target).items()}
    metrics |= {f"teacher/{name}": value for name, value in norm_summary(target, target).items() if name != "collapse"}
    return metrics


def _above_cube(name: str, output: Tensor, cube: Tensor, target: Tensor) -> dict[str, float]:
    difference = (output - target).square().sum(1) - (cube - target).square().sum(1)
    difference = difference / target.square().sum(1).mean()
    return interval(f"{name}{ABOVE}cube", float(difference.mean()), float(difference.std() / len(difference) ** 0.5))


def _further(config: Config, data: SentenceData, network: CellularCube) -> dict[str, float]:
    """Of each further teacher: how the cube's head reads its vectors beside plain maps, over the test sentences that have one."""
    principal, metrics = fit_principal(data.train["embeddings"]), {}
    for name, further in data.further.items():
        present = present_rows(data.test[name])
        target, outputs = data.test[name][present], {"cube": reconstruct(network, data.test["embeddings"], head=name)}
        outputs |= baseline_outputs(data, name, principal, config.code_size)
        outputs = {who: output[present] for who, output in outputs.items()}
        for who, output in outputs.items():
            found = reconstruction_quality(output, target, further.mean, further.scale)
            metrics |= {f"{who}/{name}_{measure}": found[measure] for measure in ("fvu", "cosine")}
            if who != "cube":
                metrics |= _above_cube(f"{who}/{name}_fvu", output, outputs["cube"], target)
        metrics[f"teacher/{name}_agreement"] = further.agreement
        metrics[f"teacher/{name}_present"] = float(present.double().mean())
    return metrics


def decoded(config: Config, data: SentenceData, state: TrainState, outputs: dict[str, Tensor]) -> dict[str, dict[str, list[str]]]:
    """How ("retrieved", "written") to who to sentences: the first test sentences, as each one's vectors decode.

    retrieved: the nearest known sentence; written: by the decoder that was trained on the teacher's vectors.
    """
    number = min(MAX_DECODED, len(data.test["labels"]))
    target = data.test["embeddings"][:number]
    generator = torch.Generator().manual_seed(config.seed)
    vectors = {
        "cube": outputs["cube"][:number],
        "teacher": target,
        "pca": outputs["pca"][:number],
        "mean_vector": torch.zeros_like(target),
        "random_vector": torch.randn(target.shape, generator=generator).to(target),
    }
    bank = data.raw(data.train["embeddings"])
    found = {"retrieved": {who: retrieve(bank, data.sentences["train"], data.raw(v)) for who, v in vectors.items()}}
    if TEXT_DECODER in state.modules:
        vocabulary, decoder = Vocabulary(data.sentences["train"]), state.modules[TEXT_DECODER].eval()
        found["written"] = {who: write_sentences(decoder, vocabulary, v) for who, v in vectors.items()}
    return found


def _text(config: Config, data: SentenceData, state: TrainState, outputs: dict[str, Tensor]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    number = min(MAX_DECODED, len(data.test["labels"]))
    judge = PhraseJudge(
        data.teacher,
        data.raw(data.train["embeddings"]),
        data.train["labels"],
        data.sentences["train"],
        data.raw(data.test["embeddings"][:number]),
        data.test["labels"][:number],
        data.sentences["test"][:number],
    )
    for how, sentences in decoded(config, data, state, outputs).items():
        metrics |= judge.table(sentences, "teacher", ("mean_vector", "random_vector"), config.seed, f"{how}_")
    return {name: value for name, value in metrics.items() if value == value}  # a share without a ceiling is not a number


def _probes(config: Config, data: SentenceData, network: CellularCube) -> dict[str, float]:
    principal = fit_principal(data.train["embeddings"])
    train, test = data.train["embeddings"][:MAX_PROBED], data.test["embeddings"]
    size = config.code_size
    features = {
        "cube": (reconstruct(network, train), reconstruct(network, test)),
        "pca": tuple(principal.reconstructed(vectors, size) for vectors in (train, test)),
        "teacher": (train, test),
    }
    arrays = {who: tuple(vectors.cpu().numpy() for vectors in pair) for who, pair in features.items()}
    labels = {"label_accuracy": tuple(split["labels"].cpu().numpy() for split in (data.train, data.test))}
    surface = [surface_labels(data.sentences[split]) for split in ("train", "test")]
    labels |= {f"{name}_accuracy": (surface[0][name], surface[1][name]) for name in surface[0]}
    metrics: dict[str, float] = {}
    for name, (of_train, of_test) in labels.items():
        metrics |= probe_table(arrays, (of_train[: len(train)], of_test), name, config.seed)
    triples = data.triples
    if min(len(triples["train"]), len(triples["test"])) > len(data.mean) // 4:
        chosen = {name: data_vectors[triples[name][:MAX_PROBED]] for name, data_vectors in _vectors(data).items()}
        parts = {
            who: {name: make(v.flatten(0, 1)).unflatten(0, v.shape[:2]).cpu().numpy() for name, v in chosen.items()}
            for who, make in {
                "cube": functools.partial(reconstruct, network),
                "pca": functools.partial(principal.reconstructed, size=size),
                "teacher": lambda vectors: vectors,
            }.items()
        }
        split = [{who: part[name] for who, part in parts.items()} for name in ("train", "test")]
        metrics |= compositionality(split[0], split[1], config.seed)
    return {name: value for name, value in metrics.items() if value == value}


def _vectors(data: SentenceData) -> dict[str, Tensor]:
    return {"train": data.train["embeddings"], "test": data.test["embeddings"]}


def _inside(config: Config, data: SentenceData, network: CellularCube, outputs: dict[str, Tensor]) -> dict[str, float]:
    target = data.test["embeddings"]
    watched = target[: num_watched(len(target), config.side, config.channels)]
    observation = observe(network.eval(), watched)
    metrics = inside_measures(observation, data.test["labels"][: len(watched)], config.seed)
    layers = similarity_table(target, {who: outputs[who] for who in ("cube", "pca", "autoencoder")})
    layers |= {f"cube_{name.replace(' ', '_')}": row for name, row in layer_similarity(observation, watched).items()}
    metrics |= {f"{who}/{name}": value for who, row in layers.items() for name, value in row.items()}
    metrics |= _face_slope(observation.front[0], config)
    split = network.cube.geometries[0].bands.split
    names = ("local", "functional", "distant")
    metrics |= {f"{name}/share_of_neighbours": share for name, share in zip(names, split.shares, strict=True)}
    return metrics


def _face_slope(front: Tensor, config: Config) -> dict[str, float]:
    """Mean box-counting slope of the cells whose part of the code is above the face's root mean square; and of shuffled cells."""
    face = front.unflatten(1, (config.side, config.side, -1))[..., : config.numbers_per_cell].square().sum(-1)
    active = face >= face.mean((1, 2), keepdim=True)
    order = torch.randperm(config.side**2, generator=torch.Generator().manual_seed(config.seed))
    shuffled = active.flatten(1)[:, order].view(active.shape)
    return {f"{who}/face_box_slope": float(box_counting_slope(a).mean()) for who, a in (("cube", active), ("shuffled", shuffled))}


@torch.no_grad()
def _options(config: Config, data: SentenceData, network: CellularCube) -> dict[str, float]:
    """What the options that are on have to show for themselves."""
    principal, test = fit_principal(data.train["embeddings"]), data.test["embeddings"]
    network.eval()
    made = synthetic_vectors(principal, SYNTHETIC_SENTENCES, config.seed + 1)
    unexplained = (reconstruct(network, made) - made).square().sum() / made.square().sum()
    metrics = {
        "cube/synthetic_fvu": float(unexplained),
        "best_linear/synthetic_fvu": best_linear_fvu(shrunk_variances(principal), config.code_size),
    }
    output = network(test[:64])
    if config.bottleneck_weight:
        metrics["cube/code_nats"] = float(output.cost.mean())
    if config.sleep_threshold:
        metrics |= _sleep(network, test)
    if config.router_tokens:
        metrics["cube/path_entropy"] = float(network.routers_in.path_entropy())
    if config.prefix_weight:
        for size in (config.code_size // 4, config.code_size // 2):
            error = network(test, prefix=size).vectors - test
            metrics[f"cube/fvu_of_{size}_numbers"] = float(error.square().sum() / test.square().sum())
            metrics[f"pca/fvu_of_{size}_numbers"] = reconstruction_quality(
                principal.reconstructed(test, size), test, data.mean, data.scale
            )["fvu"]
    if config.universal_width and config.hardware == "coordinates":
        metrics |= larger_side(config, data, network)
    if config.domains == "two":
        is_first = data.test["labels"] < data.num_first_domain
        for name, chosen in (("first", is_first), ("second", ~is_first)):
            vectors = test[chosen]
            if len(vectors):
                found = reconstruction_quality(reconstruct(network, vectors), vectors, data.mean, data.scale)
                metrics[f"cube/{name}_domain_fvu"] = found["fvu"]
    return metrics


@torch.no_grad()
def larger_side(config: Config, data: SentenceData, network: CellularCube) -> dict[str, float]:
    """What the weights of a size-free network are worth in a cube of another side, 1.5 L, without further training.

    at_side_<n>/fvu: as they are. refitted_at_side_<n>/fvu: all but the read-out, which is fitted there in closed form;
    untrained_at_side_<n>/fvu: the same of weights that were never trained.
    """
    side, train, test = round(LARGER * config.side), data.train["embeddings"], data.test["embeddings"]

    def fvu(weights: CellularCube, refit: bool) -> float:
        larger = CellularCube(config, fit_principal(train), network.mean, float(network.scale), side).to(train.device).eval()
        left_out = ("heads.", "readout.") if refit else ("heads.",)
        kept = {name: tensor for name, tensor in weights.state_dict().items() if not name.startswith(left_out)}
        larger.load_state_dict(kept, strict=not refit)
        if refit:
            fit_readout(larger, train, data.valid["embeddings"])
        return reconstruction_quality(reconstruct(larger, test), test, data.mean, data.scale)["fvu"]

    metrics = {f"at_side_{side}/fvu": fvu(network, refit=False)}
    if config.fits_readout:
        metrics[f"refitted_at_side_{side}/fvu"] = fvu(network, refit=True)
        metrics[f"untrained_at_side_{side}/fvu"] = fvu(_fresh(config, data, network), refit=True)
    return metrics


@torch.no_grad()
def _sleep(network: CellularCube, vectors: Tensor) -> dict[str, float]:
    """Share of the cells that were awake; FVU of the same cube when all are; mean square of what sleep adds, in the same unit."""
    passes = [network(part) for part in vectors.split(64)]
    active = sum(output.run.active_share * len(output.vectors) for output in passes) / len(vectors)
    asleep, threshold, total = (
        torch.cat([output.vectors for output in passes]),
        network.cube.sleep_threshold,
        vectors.square().sum(),
    )
    network.cube.sleep_threshold = 0.0
    awake = reconstruct(network, vectors)
    network.cube.sleep_threshold = threshold
    return {
        "cube/active_share": active,
        "cube/sleep_error": float((asleep - awake).square().sum() / total),
        "awake_cube/fvu": float((awake - vectors).square().sum() / total),
    }
