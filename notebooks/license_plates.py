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
# # License plates: a box around every plate
#
# **Question.** How well does a one-stage detector find number plates among signs, posters and grilles that look like them, and
# how much better is it than looking for edges?
#
# 1. A **body** of convolutions and a **feature pyramid** turn the picture into maps at 1/4, 1/8 and 1/16 of its size.
# 2. At every place of every map stand **anchors**: boxes of a few sizes and proportions, $a = (x, y, w, h)$.
# 3. Two heads give each anchor a score $p$ and offsets $t$: the box is
#    $(x + t_x w,\; y + t_y h,\; w e^{t_w},\; h e^{t_h})$.
# 4. An anchor belongs to a plate when their intersection over union $\mathrm{IoU}(A, B) = |A \cap B| / |A \cup B|$ is at least
#    0.5, to the background below 0.4. Almost all are background, so the score is learned with the **focal loss**
#    $-\alpha (1 - p)^\gamma \log p$ for plates and $-(1 - \alpha)\, p^\gamma \log(1 - p)$ for the rest ($\gamma = 2$,
#    $\alpha = 1/4$), the boxes of plates' anchors with $1 - \mathrm{GIoU}$ (IoU less the
#    share of the common hull that neither box covers); both are divided by the plates' number of anchors.
# 5. **Non-maximum suppression** drops a box that overlaps a better one by IoU > 0.5; boxes scored below 0.25 are not reported.
#
# It is torchvision's `RetinaNet`. The original of this workflow was trained on `None` and reported an mAP of a constant 0; here
# pycocotools, the COCO authors' own code, does the scoring.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | 8 drawn pictures of 64 x 48 | seconds; checks that everything works, the result means nothing |
# | `laptop` | 1,000 **synthetic** pictures of 160 x 120, drawn by a program; small body | minutes on 2 CPU cores |
# | `full` | CCPD (real), ResNet-50 body with COCO's weights | for a GPU; needs `picture_folder` |
#
# Your own pictures: `dataset = yolo`, `voc` or `ccpd` with `picture_folder`, and either body.

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop or full
overrides = {}  # field name to value, for example {"dataset": "yolo", "picture_folder": "plates/train"}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where. A run folder that was started here continues elsewhere.

# %%
from trainbook.workflows import license_plates

run = trainbook.start(license_plates, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# Thresholds, size of the pictures, body and optimizer; where a person is, a form. A misspelt name or a value out of range is
# refused before anything is spent.

# %%
run.config_table()

# %% [markdown]
# ## Data
# Drawn pictures are numbered: train, valid and test are different numbers, the same in every run. Real pictures are split by
# **video**: names that differ only in the number at their end stay together, for neighbouring frames show the same car.
# A picture without a label file has no plates, and the detector learns from it too.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# - **Detector**: with the small body 0.4 million parameters, from chance.
# - **Edges**: blobs of upright edges with a plate's proportions, as plate finders did before learning. It knows no plate.
# - **Nothing**: no box at all, the floor.

# %%
run.build()

# %% [markdown]
# ## Training
# Average precision on the validation pictures is measured once per epoch; the weights that were best there are the ones that
# are evaluated and exported. The gradient is clipped: at the start the focal loss of a fresh detector can jump.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# `ap50`: area under precision over recall, a box being right at IoU at least 0.5; `ap75` at 0.75; `ap`: mean over 0.5, 0.55,
# ..., 0.95, so it asks how tight the boxes are. `top1_at_iou70`: share of pictures with plates whose best box has IoU > 0.7
# (CCPD's protocol). `precision` and `recall` are what a user meets: boxes scored at least `confidence_threshold`.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Detections**: the first held-out pictures, none picked; **worst**: those with most errors.
# - **Precision over recall** at three thresholds; the star is where `confidence_threshold` puts a user.
# - **Recall by width**: small plates are the hard ones.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, the report, and `run.json` last of all: what it says is what happened.
#
# **Limits.** Drawn plates are not streets: a detector trained on them says nothing about real ones. Boxes are upright, plates
# may be turned. The characters are not read.
#
# **References.** Lin et al. 2017, arXiv 1708.02002 (RetinaNet, focal loss), and 1612.03144 (feature pyramids); Lin et al. 2014
# (COCO); Xu et al. 2018 (CCPD).

# %%
run.finish()
