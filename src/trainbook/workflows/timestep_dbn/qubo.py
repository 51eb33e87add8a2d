"""One conditional Boltzmann machine of a trained run as a quadratic model of bits or spins, in the form that dimod reads.

python -m trainbook.workflows.timestep_dbn.qubo RUN --timestep 12 --level coarse --kind spin --out model.json

and there: dimod.BinaryQuadraticModel.from_serializable(json.load(open("model.json"))). Given z_t and the context, low energy
means a probable (z_{t-1}, h) of that level: p ~ exp(-energy) at temperature 1. This is an export for annealers and their
simulators; nothing in the workflow needs one.
"""

# V visible units, H hidden units, N = V + H variables, S states

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainbook.errors import UserError
from trainbook.files import read_json, write_atomic
from trainbook.records import BAD_INPUT, find_run
from trainbook.runtime import detect, runs_folder
from trainbook.weights import load_weights
from trainbook.workflows.timestep_dbn.autoencoder import BinaryAutoencoder, encode_all, level_sizes
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse, fields
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diagnostics import LEVELS
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.images import load_data


@dataclass(frozen=True)
class QuadraticModel:
    """E(x) = offset + linear.x + sum_ij x_i coupling_ij x_{V + j}, over bits (QUBO) or spins (Ising).

    Attributes:
        kind: BINARY for x in {0, 1}, SPIN for x in {-1, 1}.
        linear: (N,), visible units first.
        coupling: (V, H); a Boltzmann machine that is restricted has no others.
        offset: so that both kinds give one state the same energy.
    """

    kind: Literal["BINARY", "SPIN"]
    linear: Tensor
    coupling: Tensor
    offset: float = 0.0

    def energy(self, states: Tensor) -> Tensor:
        """E of each state; (S, N), values of the kind -> (S,)."""
        visible, hidden = states.split(self.coupling.shape, 1)
        return self.offset + states @ self.linear + ((visible @ self.coupling) * hidden).sum(1)

    def to_spins(self) -> "QuadraticModel":
        """The same energies with x = (1 + s) / 2: linear / 2 + coupling sums / 4, coupling / 4, the rest into the offset."""
        sums = torch.cat([self.coupling.sum(1), self.coupling.sum(0)])
        offset = self.offset + float(self.linear.sum()) / 2 + float(self.coupling.sum()) / 4
        return QuadraticModel("SPIN", self.linear / 2 + sums / 4, self.coupling / 4, offset)

    def serializable(self, info: dict[str, Any]) -> dict[str, Any]:
        """As dimod's `BinaryQuadraticModel.from_serializable` takes it; variables are called z0, z1, ... and h0, h1, ..."""
        num_visible, num_hidden = self.coupling.shape
        heads, tails = torch.cartesian_prod(torch.arange(num_visible), num_visible + torch.arange(num_hidden)).T
        return {
            "type": "BinaryQuadraticModel",
            "version": {"bqm_schema": "3.0.0"},
            "use_bytes": False,
            "index_type": "int32",
            "bias_type": "float64",
            "num_variables": num_visible + num_hidden,
            "num_interactions": num_visible * num_hidden,
            "variable_labels": [f"z{i}" for i in range(num_visible)] + [f"h{j}" for j in range(num_hidden)],
            "variable_type": self.kind,
            "offset": self.offset,
            "info": info,
            "linear_biases": self.linear.tolist(),
            "quadratic_biases": self.coupling.flatten().tolist(),
            "quadratic_head": heads.tolist(),
            "quadratic_tail": tails.tolist(),
        }


def quadratic_model(weight: Tensor, visible_bias: Tensor, context_bias: Tensor, field: Tensor) -> QuadraticModel:
    """E(z, h | z_t, g) = -(a + field).z - (b + gU).h - z W h over bits, in nats and float64.

    Args:
        weight: W, (V, H).
        visible_bias: a, (V,).
        context_bias: b + gU, (H,).
        field: Gamma_t (2 z_t - 1), (V,).
    """
    linear = -torch.cat([visible_bias + field, context_bias])
    return QuadraticModel("BINARY", linear.detach().cpu().double(), -weight.detach().cpu().double())


@torch.no_grad()
def export(run: str, timestep: int, level: int, image: int, seed: int) -> tuple[QuadraticModel, dict[str, Any]]:
    """The model that undoes one step of one level, given a held-out image with noise; and what it was made from.

    Args:
        run: a complete run's id or folder.
        timestep: t, 1..T.
        level: 0 (fine) to 2 (coarse).
        image: index of the test image z_0.
        seed: of the noise in z_{t-1} and z_t; the coarser levels of z_{t-1} are the context.

    Raises:
        UserError: when there is no such run, weight, timestep or image.
    """
    folder, runtime = find_run(run, runs_folder()), detect()
    saved = read_json(folder.config)
    if saved["workflow"] != "timestep_dbn" or saved["config"]["stage"] != "all":
        raise UserError(f"{run} has no chain of Boltzmann machines", "give a complete run of timestep_dbn")
    config = Config(**saved["config"])
    images = load_data(config, runtime).test["images"]
    for name, value, most in (("timestep", timestep, config.timesteps + 1), ("image", image + 1, len(images) + 1)):
        if not 0 < value < most:
            raise UserError(f"there is no {name} {value if name == 'timestep' else image}", f"the run has {most - 1}")
    modules = {
        "autoencoder": BinaryAutoencoder(images.shape[1], config.code_channels, config.autoencoder_width),
        "dbn": TimestepDBN(config, level_sizes(images.shape[2:], config.code_channels)),
    }
    digests = load_weights(modules, str(folder.path), runs_folder(), "RUN")
    for module in modules.values():
        module.to(runtime.device)
    clean, dbn = [code[image : image + 1] for code in encode_all(modules["autoencoder"], images)], modules["dbn"]
    schedule = flip_schedule(config.timesteps, config.schedule).to(runtime.device)
    torch.manual_seed(seed)
    previous, noisy = diffuse(clean, schedule, timestep - 1, timestep)
    blocks, field = dbn.blocks(timestep - 1, timestep), fields(noisy, schedule.coupling[timestep : timestep + 1])
    block, (_, bias) = blocks[level], dbn.contexts(blocks, previous, noisy)[level]
    info = {
        "run_id": folder.path.name,
        "authentic": saved["authentic"],
        "weights_sha256": digests["dbn"],
        "timestep": timestep,
        "level": LEVELS[level],
        "image": image,
        "seed": seed,
        "noisy_bits": "".join(str(int(bit)) for bit in noisy[level].flatten()),
    }
    return quadratic_model(block.weight[0], block.visible_bias[0], bias[0, 0], field[level][0, 0]), info


def main(arguments: list[str] | None = None) -> int:
    """Write the model to a file; 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m trainbook.workflows.timestep_dbn.qubo", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run id, or path of the run folder")
    parser.add_argument("--timestep", type=int, required=True, help="1..T; the model undoes this step")
    parser.add_argument("--level", choices=LEVELS, required=True)
    parser.add_argument("--image", type=int, default=0, help="index of the held-out image (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--kind", choices=("binary", "spin"), default="binary", help="QUBO or Ising (default binary)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    try:
        model, info = export(options.run, options.timestep, LEVELS.index(options.level), options.image, options.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    model = model.to_spins() if options.kind == "spin" else model
    write_atomic(options.out, json.dumps(model.serializable(info)).encode())
    print(f"{options.out}: {len(model.linear)} {options.kind} variables, {model.coupling.numel()} couplings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
