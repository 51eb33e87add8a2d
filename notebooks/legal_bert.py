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
# # LegalBERT: which licence is this clause from, and where does TF-IDF do better?
#
# **Question.** BERT reads words in their context; TF-IDF with a linear SVM counts them. On legal clauses the two are close in the
# literature, within one or two points everywhere in LexGLUE. How do they compare here, label by label, on clauses that do not
# name the family of licences they are from, and on your own contracts?
#
# **Model.** BERT turns tokens into $h_1, \dots, h_L$. Instead of the first token's vector the classifier sees
#
# $$\Bigl[\sum_i a_i h_i,\; \max_i h_i\Bigr], \qquad a = \mathrm{softmax}(w^\top h_1, \dots, w^\top h_L).$$
#
# The weights $a$ are the brief's legal attention; the pictures draw them over the words. `pooling = first` gives [CLS] back.
#
# | preset | data | what it is for |
# |---|---|---|
# | `smoke` | 240 real clauses of licences | seconds; checks that everything works, the result means nothing |
# | `laptop` | all clauses of the licence texts that installed packages carry, some 600, from scratch | half a minute |
# | `full` | LexGLUE's LEDGAR, Legal-BERT's weights; both downloaded, needs `pip install datasets` | for a GPU |

# %% tags=["bootstrap"]
import trainbook

# %% tags=["parameters"]
preset = "laptop"  # smoke, laptop or full
overrides = {}  # field name to value, for example {"dataset": "file", "data_file": "clauses.jsonl"}
run_id = ""  # empty: continue the newest unfinished run of this very config, or start a new one
authentic = False  # True refuses synthetic data, data without a checksum and a changed kit

# %% [markdown]
# ## Where this runs
# Config says what is learned, the machine below only where.

# %%
from trainbook.workflows import legal_bert

run = trainbook.start(legal_bert, preset, overrides, run_id, authentic)

# %% [markdown]
# ## What will be learned
# A file of your own, contracts such as CUAD's: `dataset = file` and `data_file`, JSONL or CSV with `text`, `label` and, so that
# the split is honest, `doc`.
# Legal-BERT's weights: `pretrained = nlpaueb/legal-bert-base-uncased`, with `learning_rate = 2e-5`.

# %%
run.config_table()

# %% [markdown]
# ## Data
# Clauses of 6 to 30 words; the label is the family of the licence. Clauses that name a family, near repeats (Jaccard index of
# three-word sequences from 0.6) and what two families share are left out; no paragraph is in two parts. Files are split by
# document, and training texts that nearly repeat a held-out text are taken out. The vocabulary is learned from the training
# texts. Other versions of the packages carry other texts: a run keeps its own in its folder and goes on with them anywhere.

# %%
run.load_data()

# %% [markdown]
# ## Model and baselines
# **TF-IDF + SVM**: words and pairs of words weighted by rarity, and a linear support vector machine; it takes seconds.
# **Majority**: the commonest label for everything.

# %%
run.build()

# %% [markdown]
# ## Training
# The weights that were best on the validation texts are kept. Interrupt at any time; it goes on bit for bit.

# %%
run.train()

# %%
run.curves()

# %% [markdown]
# ## Held-out metrics beside the baselines
# `micro_f1` is the share of right answers, since each text has one label; `macro_f1` counts every label alike. Intervals of 95 %
# come from resampling documents. `right_alone`: texts that only one of the two gets right. By label: the second table.

# %%
run.evaluate()

# %% [markdown]
# ## The pictures
# - **Attention over words**: what the classifier looked at, in texts that it labels rightly and wrongly.
# - **F1 by label**: labels at the top are TF-IDF's. **Where TF-IDF wins**: by length of the text, and who is right alone.
# - **Confusion**: what is taken for what. **Attention**: between tokens, head by head.

# %%
run.draw()

# %% [markdown]
# ## Finish
# Writes the weights as safetensors, `tokenizer.json`, `where_tfidf_wins.txt` with labels and examples, the report, and `run.json`
# last of all: what it says is what happened.
#
# **Limits.** No legal advice. From scratch and on some hundred texts BERT knows no more than these texts say; pretrained weights
# are what makes it better than counting words. Each text has one label here, while real clauses can have several.
#
# **References.** Devlin et al. 2019 (BERT); Chalkidis et al. 2020 (Legal-BERT); Chalkidis et al. 2022 (LexGLUE); Hendrycks et al.
# 2021 (CUAD); Schuster and Nakajima 2012 (WordPiece).

# %%
run.finish()
