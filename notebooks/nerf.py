# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NeRF: a scene from posed pictures, by a network and by a grid
#
# **Question.** From some dozens of pictures with known cameras, what does the scene look like from where no camera stood? And
# what does a network with positional encoding buy over a dense grid, and the other way round?
#
# A ray $r(t) = o + t d$ leaves a camera through a pixel. A field gives every point a density $\sigma$ and, with the viewing
# direction, a colour $c$. What the pixel shows is
#
# $$C = \int_{t_n}^{t_f} T(t)\, \sigma(r(t))\, c(r(t), d)\, dt + T(t_f)\, c_{bg},
# \qquad T(t) = e^{-\int_{t_n}^{t} \sigma(r(s))\, ds}.$$
#
# With $S$ intervals of width $w$ and one sample in each, $\tau_i = \sigma_i w$ and $T_i = e^{-\sum_{j<i} \tau_j}$, it becomes
# $C = \sum_i (T_i - T_{i+1})\, c_i + T_{S+1}\, c_{bg}$. The far plane is closed: the last interval ends there, and what light is
# left comes from the white background. Training minimises the squared error of $C$ on random rays.
#
# - **mlp**: $\gamma(x) = (x, \sin 2^k \pi x, \cos 2^k \pi x)_{k<L}$ into a network; the direction enters before the colour.
# - **grid**: densities and features at the vertices of a cube, interpolated linearly; a small network makes the colour.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | the synthetic scene, 16 pixels | seconds; checks that everything works, the result means nothing |
# | `laptop` | the synthetic scene, 48 cameras, 64 pixels | minutes on one CPU core |
# | `full` | the same at 400 pixels, with the published network | for a GPU; or a folder of nerf_synthetic, see below |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop or full
overrides = {}  # field name to value, for example {"dataset": "blender", "data_folder": "nerf_synthetic/lego", "bound": 1.5}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where. A run folder that was started here continues elsewhere.

# %%
from trainbook.workflows import nerf

run = trainbook.start(nerf, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# Your own scene: `dataset = blender` and `data_folder`, with `transforms_train.json` (`camera_angle_x`; per frame `file_path` and
# `transform_matrix`) and PNG pictures, transparent ones over white. `near`, `far` and `bound` must hold it.

# %%
run.config_table()

# %% [markdown]
# ## Data
# The embedded scene is **synthetic**: spheres and a disc, rendered by exact ray intersection with 16 rays per pixel, so that
# depths are known too. Every eighth view is held out.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# Beside the fields stand the picture of the **nearest** training camera and the best **single colour**. A field that is worse
# than the nearest picture has learned nothing about space.

# %%
run.build()

# %% [markdown]
# ## Training
# One stage per field, each on the same rays in the same order. The weights with the lowest error on the validation views are
# kept. Interrupt at any time; it goes on bit for bit.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# `psnr_db`: mean over held-out views of $-10 \log_{10}$ of the mean squared error; 3 dB are half the error. `worst_psnr_db`: of
# the worst view. `ssim`: structure, 1 is equal. `gain_over_nearest_view_db`: what the field adds to the nearest picture.
# `median_depth_error` (synthetic scene only): in the scene's unit; the cameras stand 4 away.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Held out**: truth, both fields, the nearest view, and everybody's error.
# - **Turntable**: from cameras that took no picture. Floating specks show up here first.
# - **Depth**: where the light stops, beside the exact depth.
# - **PSNR by view**: one bad view is a hole in the cameras' coverage.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, the report, and `run.json` last of all: what it says is what happened.
#
# **Limits.** One network and one set of samples per ray: no second, finer sampling, so thin structures need many samples. A
# bounded scene on white, static, with known cameras. A dense grid's memory grows with the cube of its size.
#
# **References.** Mildenhall et al. 2020, arXiv 2003.08934 (NeRF); Max 1995 (volume rendering); Sun et al. 2022, arXiv 2111.11215
# (dense grids); Wang et al. 2004 (SSIM).

# %%
run.finish()
