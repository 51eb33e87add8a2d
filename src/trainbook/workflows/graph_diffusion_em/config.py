"""What a graph-diffusion EM run can be told, and what it promises."""

from typing import Literal

from pydantic import Field

from trainbook.optimization import OptimizationConfig


class Config(OptimizationConfig):
    """The choices of a graph-diffusion EM run."""

    codebook_stride: int = Field(default=2, ge=1, le=8)
    """x"""
    patch_size: int = Field(default=8, ge=4, le=16)
    """x"""
    diffusion: Literal["attention", "heat", "pagerank", "explicit", "none"] = "attention"
    """x"""
    diffusion_rounds: int = 1
    """x"""
    num_heads: int = 4
    """x"""
    num_neighbours: int = 16
    """x"""
    search_radius: int = 10
    """x"""
    graph_stride: int = 2
    """x"""
    head_em_steps: int = 3
    """x"""
    head_em_nodes: int = 2000
    """x"""
    polish_passes: int = 1
    """x"""
    polish_neighbours: int = 47
    """x"""
    polish_stride: int = 4
    """x"""


TARGETS = ()
