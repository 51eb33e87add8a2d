"""Speed and quality of graph-diffusion EM beside its peers: `python -m tests.benchmarks.graph_diffusion_em`.

Needs the extra `benchmarks` (bm3d, torch-geometric), and ../shared/data/denoising beside the checkout for quality on Set12.
Needed: the denoiser 5 times faster than bm3d at its PSNR; neighbours 5 times faster than scikit-learn's brute force; an EM
iteration 2 times faster than scikit-learn's GaussianMixture at equal log-likelihood; diffusion 3 times faster than
torch-geometric's exact kernels and scipy's expm_multiply. One part alone: name it, such as `... graph_diffusion_em em`.
"""

# N patches, K components, d coefficients

import io
import sys
import tarfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.benchmarks import pairing

# isort: split
import numpy as np
import psutil
import scipy.sparse
import torch
from PIL import Image
from scipy.sparse.linalg import expm_multiply
from skimage import data as photos
from sklearn.mixture import GaussianMixture as Peer
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from trainbook.workflows.graph_diffusion_em import baselines
from trainbook.workflows.graph_diffusion_em.codebook import start_codebook
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.denoiser import denoise
from trainbook.workflows.graph_diffusion_em.diffusion import diffuse
from trainbook.workflows.graph_diffusion_em.graph import knn_graph, laplacian
from trainbook.workflows.graph_diffusion_em.mixture import GaussianMixture, em_step, expectation
from trainbook.workflows.graph_diffusion_em.patches import mean_columns, patchify

SHARED = Path(__file__).parents[3] / "shared/data/denoising"  # beside the checkout
SIGMA = 25 / 255
ROUNDS = 5
TRAINING_PICTURES, PATCHES_EACH, EM_ITERATIONS = 390, 300, 30  # of the 400; the last ten are for choosing settings
SETTINGS = Config(num_components=128)
FAST = SETTINGS.model_copy(update={"codebook_rank": 16, "graph_stride": 4, "polish_stride": 6, "head_em_nodes": 500})
QUALITY_TOLERANCE = 0.02  # dB
LARGE = 8  # number of the picture of Set12 with 512 x 512 pixels that is timed
SIZES = (64, 128, 256, 512, 1024)
MEMORY_EXPONENT = 1.1  # of memory over pixels: 1 is linear


def pictures(name: str) -> list[tuple[str, Tensor]]:
    """Names and pictures, (1, H, W), of an archive in ../shared/data/denoising."""
    with tarfile.open(SHARED / f"{name}.tar") as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        arrays = [(Path(m.name).stem, np.array(Image.open(io.BytesIO(tar.extractfile(m).read())))) for m in members]
    return [(stem, torch.from_numpy(array).float().div(255).unsqueeze(0)) for stem, array in arrays]


def fit_codebook(config: Config = SETTINGS, seed: int = 0) -> GaussianMixture:
    """The mixture of clean patches of the training pictures, by as many iterations as stand above."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _, image in pictures("train400")[:TRAINING_PICTURES]:
        z = patchify(image, config.patch_size)
        parts.append(z[torch.randperm(len(z), generator=generator)[:PATCHES_EACH]])
    z = torch.cat(parts)[:, ~mean_columns(config.patch_size, 1)]
    mixture = start_codebook(config, z)
    for _ in range(EM_ITERATIONS):
        em_step(mixture, z)
    return mixture


def noisy(image: Tensor, number: int) -> Tensor:
    """Not clipped; the seed is the picture's number."""
    return image + SIGMA * torch.randn(image.shape, generator=torch.Generator().manual_seed(number))


def psnr(image: Tensor, clean: Tensor) -> float:
    """Of the clipped picture, in dB."""
    return -10 * float((image.clamp(0, 1) - clean).double().square().mean().log10())


def quality_on_set12(mixture: GaussianMixture) -> dict[str, list[float]]:
    """PSNR per picture of each method: noise not clipped and seeded by the picture's number, output clipped."""
    methods = {
        "ours": lambda y: denoise(SETTINGS, mixture, y, SIGMA).image,
        "ours_fast": lambda y: denoise(FAST, mixture, y, SIGMA).image,
        "bm3d": partial(baselines.bm3d(), sigma=SIGMA) if baselines.bm3d_is_installed() else None,
        "non_local_means": lambda y: baselines.non_local_means()(y, SIGMA),
        "total_variation": lambda y: baselines.total_variation(1.2)(y, SIGMA),
    }
    set12 = pictures("set12")
    return {
        who: [psnr(method(noisy(image, number)), image) for number, (_, image) in enumerate(set12)]
        for who, method in methods.items()
        if method
    }


def compare_denoisers() -> list[pairing.Comparison]:
    """Quality on Set12, then time of the whole denoiser on two of its pictures, of 256 x 256 and of 512 x 512 pixels."""
    if not SHARED.is_dir():
        print(f"denoiser: left out, {SHARED} is not there")
        return []
    mixture = fit_codebook()
    found = quality_on_set12(mixture)
    print("\nSet12, sigma 25, PSNR in dB; the codebook saw 390 pictures of another set")
    print("            " + " ".join(f"{stem:>6}" for stem, _ in pictures("set12")) + "    mean")
    for who, values in found.items():
        print(f"{who:>16}" + " ".join(f"{value:6.2f}" for value in values) + f"   {np.mean(values):.3f}")
    worst = min(a - b for a, b in zip(found["ours"], found["non_local_means"], strict=True))
    print(f"least gain over non-local means: {worst:+.2f} dB")
    set12 = pictures("set12")
    peers = {
        "bm3d": baselines.bm3d,
        "skimage fast NLM": baselines.non_local_means,
        "skimage TV": lambda: baselines.total_variation(1.2),
    }
    pairs = [(FAST, "denoiser, fast", 0, name) for name in peers]
    pairs += [(SETTINGS, "denoiser", 0, "bm3d"), (FAST, "denoiser, fast", LARGE, "bm3d")]
    comparisons = []
    for settings, label, number, name in pairs:
        if name != "bm3d" or baselines.bm3d_is_installed():
            image = set12[number][1]
            y = noisy(image, number)
            ours, theirs = partial(denoise, settings, mixture, y, SIGMA), partial(peers[name](), y, SIGMA)
            options = {"benchmark": f"{label}, {image.shape[1]} pixels", "peer": name, "unit": "kilopixels"}
            comparisons.append(pairing.alternate(ours, theirs, ROUNDS, units=image.numel() / 1e3, **options))
    for who in ("ours", "ours_fast"):
        if "bm3d" in found:
            difference = np.mean(found[who]) - np.mean(found["bm3d"])
            verdict = "at its PSNR" if difference >= -QUALITY_TOLERANCE else "NOT AT ITS PSNR"
            print(f"{who} minus bm3d: {difference:+.3f} dB; {verdict}")
    return comparisons


def compare_neighbours() -> list[pairing.Comparison]:
    """Ours looks in a window of 21 x 21, the peer at all patches; then both at all."""
    image = torch.from_numpy(photos.camera() / 255).float()[None, 200:256, 200:256]
    size, k = 8, 16
    z = patchify(image, size).numpy()
    radius = image.shape[1] - size

    def theirs() -> np.ndarray:
        return NearestNeighbors(n_neighbors=k + 1, algorithm="brute", n_jobs=1).fit(z).kneighbors(z)[0]

    ours = knn_graph(image, size, k, radius)
    distances = np.sort(theirs() ** 2, 1)[:, 1:] / z.shape[1]
    np.testing.assert_allclose(ours.distances.numpy(), distances, rtol=1e-3, atol=1e-6)
    same = pairing.alternate(
        lambda: knn_graph(image, size, k, radius), theirs, ROUNDS,
        benchmark="neighbours, window = all", peer="scikit-learn brute", unit="patches", units=len(z),
    )  # fmt: skip
    large = torch.from_numpy(photos.camera() / 255).float()[None, 100:228, 100:228]
    patches = patchify(large, size).numpy()
    window = pairing.alternate(
        lambda: knn_graph(large, size, k, 10),
        lambda: NearestNeighbors(n_neighbors=k + 1, algorithm="brute", n_jobs=1).fit(patches).kneighbors(patches),
        ROUNDS, benchmark="neighbours, window 21 x 21", peer="scikit-learn brute", unit="patches", units=len(patches),
    )  # fmt: skip
    return [window, same]


def compare_em() -> list[pairing.Comparison]:
    """One iteration of EM from the same mixture on the same patches; both in float64, then both in float32."""
    camera = torch.from_numpy(photos.camera() / 255).float()[None]
    z = patchify(camera, 8, 2)[:, ~mean_columns(8, 1)]
    z = z + 5 / 255 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))  # no exact zeros: the peer has no floor
    config = Config(num_components=32)
    mixture = start_codebook(config, z)
    for _ in range(3):
        em_step(mixture, z)
    start = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}

    def ours(model: GaussianMixture, patches: Tensor) -> float:
        model.load_state_dict(start)
        return em_step(model, patches)

    def peer(array: np.ndarray) -> Peer:
        model = Peer(
            len(mixture.weights), reg_covar=0, tol=0, max_iter=1, weights_init=start["weights"].numpy().astype(array.dtype),
            means_init=start["means"].numpy().astype(array.dtype),
            precisions_init=np.linalg.inv(start["covariances"].double().numpy()).astype(array.dtype),
        )  # fmt: skip
        model.weights_ = model.weights_init / model.weights_init.sum()
        model.means_ = model.means_init
        model.precisions_cholesky_ = np.linalg.cholesky(model.precisions_init)
        return model

    def theirs(array: np.ndarray, model: Peer) -> float:
        model.means_, model.weights_ = model.means_init, model.weights_init / model.weights_init.sum()
        model.precisions_cholesky_ = np.linalg.cholesky(model.precisions_init)
        mean, log_responsibilities = model._e_step(array)  # what `fit` repeats
        model._m_step(array, log_responsibilities)
        return mean

    comparisons = []
    for dtype in (np.float64, np.float32):
        array = z.numpy().astype(dtype)
        model, patches = peer(array), torch.from_numpy(array)
        mixture = mixture.to(patches.dtype)
        before, after = ours(mixture, patches), expectation(mixture, patches).log_likelihood / len(z)
        assert abs(before - theirs(array, model)) < 1e-4 * abs(before)
        assert abs(after - float(model.score(array))) < 1e-3 * abs(after)
        print(f"EM, {np.dtype(dtype).name}: log-likelihood per patch {after:.4f}, scikit-learn {model.score(array):.4f}")
        comparisons.append(
            pairing.alternate(
                partial(ours, mixture, patches), partial(theirs, array, model), ROUNDS,
                benchmark=f"EM iteration, {np.dtype(dtype).name}", peer="GaussianMixture", unit="patches", units=len(z),
            )
        )  # fmt: skip
    return comparisons


def compare_diffusion() -> list[pairing.Comparison]:
    """Heat and PageRank of patches on one graph, float64 on both sides."""
    image = torch.from_numpy(photos.camera() / 255)[None, 200:240, 200:240]
    graph = knn_graph(image, 8, 16, 10)
    scale = 2 * graph.distances.median()
    L = laplacian(graph.neighbours, (-graph.distances / scale).exp())
    x, time = patchify(image, 8), 5.0
    sparse = scipy.sparse.csr_array((L.values().numpy(), L.col_indices().numpy(), L.crow_indices().numpy()), L.shape)
    array = x.numpy()
    expected = expm_multiply(-time * sparse, array)
    np.testing.assert_allclose(diffuse(L, x, "heat", time, tolerance=1e-9).numpy(), expected, atol=1e-7)
    options = {"unit": "signals", "units": x.shape[1]}
    comparisons = [
        pairing.alternate(
            lambda: diffuse(L, x, "heat", time, tolerance=1e-9), lambda: expm_multiply(-time * sparse, array), ROUNDS,
            benchmark="heat", peer="scipy expm_multiply", **options,
        )
    ]  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch_geometric.transforms import GDC
    except ImportError:
        print("diffusion: torch-geometric is not installed: pip install '.[benchmarks]'")
        return comparisons
    A = torch.eye(len(x), dtype=torch.float64) - L.to_dense()  # symmetric, normalised already: the peer only diffuses it
    rows, columns = A.nonzero().T
    edges, weights = torch.stack([rows, columns]), A[rows, columns]
    gdc = GDC(normalization_in=None)
    for method, ours_time, peer_options in (
        ("heat", time, {"method": "heat", "t": time}),
        ("pagerank", 9.0, {"method": "ppr", "alpha": 0.1}),
    ):

        def theirs(peer_options: dict = peer_options) -> Tensor:
            return gdc.diffusion_matrix_exact(edges, weights, len(x), **peer_options) @ x

        def ours(method: str = method, ours_time: float = ours_time) -> Tensor:
            return diffuse(L, x, method, ours_time, tolerance=1e-9)

        torch.testing.assert_close(ours(), theirs(), atol=1e-6, rtol=1e-5)
        comparisons.append(pairing.alternate(ours, theirs, ROUNDS, benchmark=method, peer="torch-geometric GDC exact", **options))
    return comparisons


def memory_curve() -> None:
    """Peak memory of the denoiser over the size of the picture, each in its own process."""
    import subprocess

    peaks = []
    for size in SIZES:
        command = [sys.executable, "-m", "tests.benchmarks.graph_diffusion_em", "peak", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    print("\nmemory of the denoiser beyond what was there before it")
    for size, peak in zip(SIZES, peaks, strict=True):
        print(f"{size:5d} x {size:<5d} {peak / 2**20:8.1f} MiB  {peak / size**2:8.0f} bytes per pixel")
    slope = np.polyfit(np.log([size**2 for size in SIZES[2:]]), np.log(peaks[2:]), 1)[0]
    verdict = "linear" if slope <= MEMORY_EXPONENT else "NOT LINEAR"
    print(f"exponent over pixels from {SIZES[2]} x {SIZES[2]} on: {slope:.2f}; {verdict}")


def peak(size: int) -> None:
    """Print the memory that denoising a picture of this size takes at its peak, in bytes."""
    camera = torch.from_numpy(photos.camera() / 255).float()[None]
    image = camera.repeat(1, 2, 2)[:, :size, :size].contiguous()
    config = Config(num_components=16)
    mixture = start_codebook(config, patchify(camera[:, :128, :128], 8, 4)[:, ~mean_columns(8, 1)])
    before = psutil.Process().memory_info().rss
    denoise(config, mixture, noisy(image, 0), SIGMA)
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(high.split()[1]) * 1024 - before)  # of this process: getrusage would count the one that started it


PARTS: dict[str, Callable[[], list[pairing.Comparison]]] = {
    "neighbours": compare_neighbours,
    "em": compare_em,
    "diffusion": compare_diffusion,
    "denoiser": compare_denoisers,
}


def main() -> None:
    """Every part that is named, or all; the memory curve last."""
    if sys.argv[1:2] == ["peak"]:
        peak(int(sys.argv[2]))
        return
    chosen = sys.argv[1:] or [*PARTS, "memory"]
    print(f"torch {torch.__version__}, one thread, CPU time, alternating")
    comparisons = [comparison for name, part in PARTS.items() if name in chosen for comparison in part()]
    if comparisons:
        pairing.report(comparisons)
    if "memory" in chosen:
        memory_curve()


if __name__ == "__main__":
    main()
