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
# # Clinical series: a forecast and a risk for every hour, by a transformer that cannot see the future
#
# **Question.** From 24 hours of bedside signals, what will the next 12 hours bring, and will the patient die? How close does a
# causal transformer come to the best possible answer, and does it beat the regressions that one would try first?
#
# **Model.** 1,440 minutes are cut into 24 patches of 60. A token holds its patch's values $x$, what was observed $o$, their mean
# and deviation: $h_p = W\,[x_p, o_p, \bar x_p, s_p] + e_p$. Layers of attention follow in which token $p$ attends to
# $1, \dots, p$ alone. From every token come the standardised means of the next 12 patches $\hat y_p$ and the log-odds of death
# $\hat z_p$; to both a linear answer from the last patch mean and the mean so far is added. Minimised is the mean over
# patients and tokens of
#
# $$\mathrm{BCE}(d, \hat z_p) + \tfrac{1}{2}\,\lVert \hat y_p - y_p \rVert^2 / \text{observed}.$$
#
# That no token sees a later one is tested: changing the future leaves every earlier output the same, bit for bit.
#
# **The embedded series are synthetic**, and everything says so. Their generator is known: given one of seven grades of severity,
# each variable is a normal process, $x(t) = \mu + s(a + bt) + \text{offset} + \text{circadian wave} + u(t) + \text{noise}$,
# with an Ornstein-Uhlenbeck process $u$, and the grade decides the chance of death. So Bayes' rule with a Kalman filter per
# grade gives the exact risk and the exact expected forecast: the **oracle**, which nothing can beat but by luck.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | 160 synthetic patients, 4 hours | seconds; checks that everything works, the result means nothing |
# | `laptop` | synthetic patients, 24 hours, the oracle beside the model | a minute or two on 2 CPU cores |
# | `full` | PhysioNet 2012, set A: 4,000 real ICU stays, downloaded or from `data_path` | the brief's size, for a GPU |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop or full
overrides = {}  # field name to value, for example {"dataset": "physionet", "sample_minutes": 60, "data_path": "set-a.tar.gz"}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where.

# %%
from trainbook.workflows import clinical_series

run = trainbook.start(clinical_series, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# A file of your own: `dataset = csv`, `data_path`, `value_columns`, and `outcome_file` if outcomes are known. Continuous glucose
# readings, for example: a patch of 5 minutes, 180 minutes to read, 12 patches (an hour) to forecast.

# %%
run.config_table()

# %% [markdown]
# ## Data
# Split by patient: all windows of a patient are in one part. Grey: what is read; black dots: patch means to forecast.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# **Persistence** repeats the last hour's mean, **day mean** that of all 24 hours, **ridge** regresses each coming hour on all
# hourly means, **logistic** regression gets summaries of every variable. Penalties are chosen on the validation patients.

# %%
run.build()

# %% [markdown]
# ## Training
# The weights that were best on the validation patients are kept. Interrupt at any time; it goes on bit for bit.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# `mae` is in deviations of the training readings, `mae_HR` and the like in the variable's unit; lower is better. `auroc`: higher.
# Intervals of 95 % come from resampling the test patients. `share_of_oracle_auroc` is (AUROC - 0.5) over the oracle's.
# The second table says for each baseline whether the model is surely better.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Forecast**: bands that held 50 and 90 % of what came on the validation patients, around the model's line.
# - **Error by horizon**: how each forecast worsens hour by hour. **Comparison**: everybody's metrics.
# - **ROC** and **calibration**: are those with a stated risk of 30 % dying in 30 % of cases?
# - **Risk by hour**: what the model said as each hour ended. **Attention**: nothing above the diagonal.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, the report, and `run.json` last of all: what it says is what happened.
#
# **Limits.** No medical device. The synthetic patients are kinder than real ones: gaps come by chance, treatment does not exist,
# and regressions are nearly optimal on them. Bands have one width for all patients. On real stays what is measured, and how
# often, depends on the staff's worry.
#
# **References.** Silva et al. 2012 (PhysioNet Challenge 2012); Goldberger et al. 2000 (PhysioNet); Vaswani et al. 2017
# (attention); Nie et al. 2023 (patches of a series as tokens); Kalman 1960; Hall et al. 2018 (glucose readings).

# %%
run.finish()
