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
# # Knowledge distillation: what is each component of HPM-KD worth?
#
# **Question.** A small student can learn from labels alone, or also from the softened answers of a large teacher (Hinton's
# knowledge distillation, KD). HPM-KD adds six components to that. Does any of it make a better student, and which part?
#
# With teacher logits $t$, student logits $s$, label $y$, temperature $T$ and $\sigma$ the softmax, KD minimises
#
# $$L = (1-a)\,\mathrm{CE}(y, s) + a\,T^2\,\mathrm{KL}\bigl(\sigma(t/T)\,\|\,\sigma(s/T)\bigr).$$
#
# | component | what it does here | without it |
# |---|---|---|
# | progressive chain | assistants of sizes in between; kept only if a trial on valid says so | teacher to student at once |
# | temperature | $T$ moves: cosine, plateau, adversarial, or by its gradient on valid | $T$ stays |
# | multi-teacher | several teachers, weighted image by image by a gate fitted on held-out labels | the first teacher |
# | adaptive configuration | loss, $T$, $a$, rate, decay by successive halving on valid, defaults included | the defaults |
# | shared memory | teachers' answers to a finite set of views are kept | asked anew in every step |
# | parallel pipeline | several networks train at once in processes of their own; same results bit for bit | one after the other |
#
# That HPM-KD beats KD is a hypothesis here. The published claim is not borne out by its own logs; what this run finds is in
# the tables below, with intervals, whichever way it goes.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | scikit-learn's digits | seconds; checks that everything works, the result means nothing |
# | `laptop` | scikit-learn's 1,797 real 8x8 digits, 5 seeds | minutes on 2 CPU cores; a result worth looking at |
# | `mnist_cpu` | MNIST, teachers of 701,178 parameters, few epochs, 3 seeds | an hour or two on 2 CPU cores |
# | `full` | MNIST, teachers of 11,172,810 parameters, 20 epochs, 5 seeds | the brief's setting, for a GPU |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop, mnist_cpu or full
overrides = {}  # field name to value, for example {"temperature_law": "hyper", "num_teachers": 5}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where. How many networks train at once is the machine's affair too
# (`TRAINBOOK_JOBS`); the results are the same for any number.

# %%
from trainbook.workflows import distillation

run = trainbook.start(distillation, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# Every field, its bounds and its meaning. `stage` trains the teachers or one kind of student alone; `teacher` takes a teacher
# that another run has trained. Every component has a field that switches it off.

# %%
run.config_table()

# %% [markdown]
# ## Data
# The split belongs to the data set, not to the seed. Only the validation images choose anything: temperatures, weights of
# teachers, settings, assistants. The test images are read once, at the end.

# %%
run.load_data()

# %% [markdown]
# ## Networks
# The table has the networks that are exported: the first teacher, and of every main arm the student that was best on valid.
#
# **Arms**: `direct` learns from labels alone; `kd` from the first teacher; `kd_long` the same for as many steps as the whole
# chain takes, the control of the chain; `hpm_kd` with all components; `hpm_kd_without_...` with one taken out; other losses and
# several teachers by their names. Every arm has one student per seed, and students of one seed start from the same weights
# and see the same batches in the same order.
#
# **Regimes**: students see all labels, or only 100 of them (their teachers saw all), or no image of one class at all.

# %%
run.build()

# %% [markdown]
# ## Training
# Level by level: teachers, search, trial of the chain, assistants, students. One step is a chunk of one network's training;
# the networks of a level take turns. Interrupt at any time: run the cells again, or `trainbook resume`, and it goes on bit
# for bit. `retention` is the accuracy on valid as a share of the teacher's.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics and what the differences say
# Means over seeds. `points_over_...` is a planned contrast in points of accuracy with its 95 % interval; `..._p` is its
# paired t-test's p after Holm's correction. The second table has every pair that is compared: the error of the one in front
# less that of the one in the heading, seed by seed; above zero the latter is better. `agreement` and `divergence` say how
# faithful a student is to the teacher, which is not the same as how good it is.
#
# With 5 seeds a difference must be about twice the seeds' spread to be seen. "Ties" means that this run has no evidence.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Accuracy** and **retention**: every arm with the interval of its mean over seeds. The axes do not start at 0.
# - **Components**: HPM-KD less itself without each component.
# - **Confusion**: which errors remain, in the regime with the fewest labels. **Calibration**: is it as often right as it says?
# - **Valid accuracy** and **temperature** over training. **Gate**: whom the students listened to, class by class.
# - **Missing class**: students that never saw a digit find it once its bias is set on valid, if they had a teacher who knew it.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors; `results.txt`, `results.csv`, `results.json` and `predictions.csv` with every network's
# scores, every test and every chosen class; the report; and `run.json` last of all. Latency and training time are measured
# here, on this machine.
#
# **Limits.** The split is fixed, so the intervals are over seeds and not over other test images; McNemar's test beside them
# is over images. The search runs once per regime, with the first seed, and its settings serve all arms that are adaptive. On
# easy data every arm ends near the teacher and none is better.
#
# **References.** Hinton, Vinyals and Dean 2015 (KD); Mirzadeh et al. 2020 (assistants); Son et al. 2021 (densely guided
# chains); Li et al. 2023 (adversarial temperature); Zhang, Chen and Wang 2022 (confidence-aware teachers); Zhao et al. 2022
# (DKD); Sun et al. 2024 (logit standardisation); Huang et al. 2022 (DIST); Jamieson and Talwalkar 2016 (successive halving);
# Stanton et al. 2021 (fidelity); Beyer et al. 2022 (consistent views).

# %%
run.finish()
