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
# # Cellular cube: sentence vectors through a three-dimensional cellular network
#
# **Question.** Can a cube of cells that all follow one learned rule carry the vectors of a language model from its front face to
# its back face, and decode a narrow code better than the linear map it starts as? Where does it win over a plain network of
# equal size, and where does it only tie?
#
# A vector $e \in \mathbb{R}^D$, standardised, becomes a code of $K = L^2$ numbers on the front face of an $L \times L \times L$
# cube, one per cell, beside learned mixtures of the same numbers (no more information, another layout). In each of
# $T \ge L - 1$ steps the first channels move one layer back, and every cell changes by
# $$x_i \leftarrow x_i + \sum_b w_{ib}\, y_{ib}, \qquad w_i = \mathrm{softmax}(\mathrm{gate}(x_i, m_i, h_i)/\tau).$$
#
# - **local** $y = W_2[\mathrm{gelu}(W_1 f + U h) \odot (1 + G h)]$, $f$ = state, three differences, mean of $3^3$ cells;
# - **functional** linear attention over the middle band, $u_i = \phi(q_i)^\top S_i / \phi(q_i)^\top z_i$,
#   $S_i = \sum_j \phi(k_j) v_j^\top$, $\phi = \mathrm{elu} + 1$, a recurrent cell;
# - **distant** a differential equation $\dot x = W_2 \tanh(W_1 x + U m + bt) - \lambda x$ driven by the mean of the far band.
#
# Bands are the shells of the neighbours, cut at 10 % and 65 % of their number; $h_i$ are learned numbers of the cell's place.
# The back face, all channels, is read by one linear map. **At step 0 the cube is PCA with $K$ components exactly**: whatever
# training adds is measured over that. Most of what arrives is a linear function of the code that was only carried; the map is
# trained on the rest, $z = (r - P e - p)/s$ with $e$ the code's channels of the back face and $r$ the others, which is what the
# experts made of it, and fitted in closed form (ridge) at the end.
#
# | preset | sentences and vectors | what it is for |
# |---|---|---|
# | `smoke` | 160 docstring sentences, TF-IDF and SVD, a cube of side 4 | seconds; a check, the result means nothing |
# | `laptop` | 2,600 docstring sentences of the installed packages, the same teacher | minutes on 2 CPU cores |
# | `minilm` | 12,000 sentences of CLINC150 and WikiSplit, all-MiniLM-L6-v2 | the real teacher; an hour |
# | `trials` | the same | also five trials against networks of equal size, three seeds each |
# | `full` | 60,000 sentences, DistilBERT, a cube of side 37 | for a GPU; not measured yet |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop, minilm, trials or full
overrides = {}  # field name to value, for example {"side": 12, "learning_rate": 1e-3}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where. A run folder that was started here continues elsewhere.

# %%
from trainbook.workflows import cellular_cube

run = trainbook.start(cellular_cube, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# Your own text: `corpus = file` and `text_file`, one sentence a line. `transformer`, `hardware`, `levels`, `router_tokens`,
# `universal_width`, `expert_columns` and the weights of the losses switch parts on and off.

# %%
run.config_table()

# %% [markdown]
# ## Data
# Near copies of a sentence stay on one side of the split. `tfidf_svd` is no language model: word counts, reduced linearly.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# **Mean**: predicts the mean. **PCA** of the same width of code. **Autoencoder** and **PCA residual** (a frozen PCA encoder and
# a network that decodes what PCA leaves), each with as many parameters as the cube. **Random features**: random units of the PCA
# code and the same closed-form read-out, as wide as the cube's, without any training. **Untrained**: the cube as it starts with
# the same closed-form read-out, which is what its experts have to improve on.

# %%
run.build()

# %% [markdown]
# ## Training
# Phases: `warm_up` on SYNTHETIC vectors where it is asked for (Gaussian with the teacher's covariance, shrunk, on which nothing
# can beat PCA), `standardise` (the read-out's $P$, $p$ and $s$), `main`, `readout` in closed form, `fine_tune`, and the decoder
# to text, which sees the teacher's vectors only. The weights of the main phase's best validation are kept; where they are worse
# than PCA, the cube goes back to that. After every epoch some held-out sentences are shown as the cube says them.
#
# $$L = w_r\,\mathrm{MSE} + w_s (1 - \cos) + w_k \tau^2 \mathrm{KL} + w_d\,\mathrm{diversity}
# + w_e(\log 3 - I(\mathrm{expert};\mathrm{cell})) + \dots$$
#
# All terms that depend on the output are zero at a perfect reconstruction, and nowhere below.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# `fvu`: share of variance left unexplained, 1 for the mean, lower is better. `cosine` is between raw vectors, where a
# common direction flatters everybody; `centred_cosine` does not. `gap closed`: the share of the way from PCA to the autoencoder.
# **Beats or not**: each one's FVU less the cube's, with a 95 % interval over test sentences; another seed trains another cube.
#
# Decoding to text: `retrieved` is the nearest known sentence, always fluent, so it proves meaning only; `written` comes from the
# frozen decoder. Shares run from the best floor (mean vector, random vector) to the ceiling (the teacher's own vector).
# Measures of the inside stand beside what shuffling leaves of them.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Planes**: the signal moves from front to back. **Gate**: which expert cells listen to, by depth and step.
# - **Flow**: where the output is sensitive, what a lesion there costs, and the most sensitive cells.
# - **Similarity**, **spectrum**: what the cube keeps of the teacher's geometry. **Examples**: sentences, decoded.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, the report, and `run.json` last of all: what it says is what happened. `core.safetensors`
# holds the rule alone, which suits every size: start a larger cube with `core = RUN`.
#
# **Limits.** A cube is slower than a plain network of its size by far, and no published cellular automaton beats PCA on sentence
# vectors that we found: the table above is the product. Random features with the same read-out are a hard baseline.
# A brief's rule to train only the experts beside a PCA transformer and a PCA decoder (`train_scope = experts_pca`) cannot
# improve on PCA: what PCA leaves is orthogonal to all that such a decoder can say.
#
# **References.** Mordvintsev et al. 2020 (growing cellular automata); Faldor and Cully 2025 (CAX); Tesfaldet et al. 2022
# (attention in cellular automata); Bena et al. 2025 (hardware and state); Katharopoulos et al. 2020 (linear attention);
# Chen et al. 2018 (neural differential equations); Rahimi and Recht 2008 (random features).

# %%
run.finish()
