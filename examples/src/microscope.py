# %% [markdown]
# # A tour of the microscope
#
# The vectors inside a language model mean many things at once. A **sparse autoencoder** (SAE) takes such a vector apart
# into a few *features* out of a long list, each with a strength, its *activation*; and many a feature means one thing
# that a person can name. An SAE is the lens of the microscope. This tour shows how to look through one. Is it a good
# lens? What does it show of one token? What tells five kinds of text apart?
#
# You need `pip install 'actstore[notebook]'` and about a minute. Model, SAEs and texts come with actstore.

# %% [markdown]
# ## 1. Load
#
# 800 documents go through the model once: facts, lists, headlines, roll calls, reviews. Two SAEs look at layer 3: one at
# the residual stream (`resid_post.3`), where everything is, and one at what the attention heads bring from earlier
# tokens (`z.3`). Every firing of every feature is stored: every activation above 0.

# %%
import pandas
from scipy.cluster.hierarchy import fcluster, linkage

import actstore
from actstore.demo import assets

world = assets()
MODEL, LAYER = world.model, 3  # ← the line to change: MODEL, LAYER = "google/gemma-2-2b", 20
SAES = [f"{world.model.parent}/gemma-scope-demo-{kind}/layer_3/width_1k/average_l0_14" for kind in ("res", "att")]
# and with it SAES = ["google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
#                     "google/gemma-scope-2b-pt-att/layer_20/width_16k/canonical"]

texts, sites = world.documents()[1:801], [f"resid_post.{LAYER}", f"z.{LAYER}"]
actstore.extract(MODEL, texts, out="microscope.act", sites=sites, saes=SAES, dtype="float32")

store = actstore.open("microscope.act")
residual, attention = store.saes
store.query("contents")

# %% [markdown]
# *With Gemma*, give it texts of your own, of as many kinds as you like to tell apart. Lines that begin with `assert`
# check what is said here about the embedded model; leave them out then.

# %% [markdown]
# ## 2. How much of the variance is explained?
#
# An SAE writes a vector as a sum of directions, one for each feature that fires, times its activation. What is missing
# then is its *error*. A good SAE explains most of the variance between tokens. The length of every token's error is in
# the table `reconstruction`; the vectors are an array that NumPy reads.

# %%
plain = store.sql("SELECT row FROM tokens WHERE NOT is_special").numpy()["row"]
explained = {}
for sae, site in zip(store.saes, sites, strict=True):
    vectors = store[site][plain]
    variance = ((vectors - vectors.mean(axis=0)) ** 2).sum()
    errors = "SELECT sum(error_norm ** 2) FROM reconstruction JOIN tokens USING (row) WHERE sae = ? AND NOT is_special"
    explained[sae] = 1 - store.sql(errors, [sae]).scalar() / variance
    print(f"{site}: {explained[sae]:.1%} of the variance explained")

# %% [markdown]
# SAEs of large models explain less; but far less than one was promised is a sign that something is wrong, and a program
# that does not look will not notice. Most often the SAE was put at a wrong place. So actstore takes this measure when it
# first meets an SAE, tries the places nearby, too, and refuses where another one fits better. These proofs are kept in
# `health`; here the share of variance *un*explained at other states of the residual stream. (`resid_pre.4` is the same
# vector as `resid_post.3` under another name.)

# %%
store.query("health", {"subject": f"{residual} @ resid*"})

# %%
assert all(share > 0.9 for share in explained.values())
assert store.sql("SELECT bool_and(ok) FROM health").scalar()

# %% [markdown]
# ## 3. L0: how many features fire on a token?
#
# Few, if the picture is to be sharp. The number that fire on a token is called its *L0*.

# %%
l0 = store.sql("""
    SELECT sae, avg(l0) AS mean, quantile_disc(l0, [0.05, 0.5, 0.95]) AS "5 %, half, 95 %", max(l0) AS most
    FROM reconstruction JOIN tokens USING (row) WHERE NOT is_special GROUP BY sae
""")
l0

# %%
assert all(round(one["mean"]) == 14 for one in l0.rows())

# %% [markdown]
# ## 4. The outlier: BOS
#
# So far special tokens were left out. Here is why. The first token of every text is BOS, "beginning of sequence"; it is
# always the same, and the model uses it for purposes of its own. SAEs are trained without it.

# %%
bos = store.sql("""
    SELECT sae, is_special AS is_bos, count(*) AS tokens, avg(norm) AS length, avg(error_norm) AS error, avg(l0) AS l0
    FROM reconstruction JOIN tokens USING (row) GROUP BY ALL ORDER BY sae, is_bos
""")
bos

# %% [markdown]
# In the residual stream, the SAE's error on BOS is longer than the vector itself: its answer is worse than none, and a
# dozen times as many features fire as on other tokens. (In Gemma 2 the vector of BOS is also many times longer than any
# other; this small model has no need of that.) One such token in every text would spoil each average and fill each list
# of strongest examples. So actstore keeps these rows, marks them `is_special`, and leaves them out of every statistic.

# %%
on_bos = next(one for one in bos.rows() if one["sae"] == residual and one["is_bos"])
assert on_bos["error"] > 1.5 * on_bos["length"] and on_bos["l0"] > 150
print(f"BOS in the residual stream: length {on_bos['length']:.1f}, error {on_bos['error']:.1f}, L0 {on_bos['l0']:.0f}")

# %% [markdown]
# ## 5. Features: from the always-on to the dead
#
# The features that fire most often. Those that fire on every third token say little about any of them; a meaning is
# more likely to be found among those that fire seldom.

# %%
store.query("feature_stats", {"sae": attention, "k": 12}).plot()

# %%
dead = store.query("dead_features", {"sae": attention})
print(f"{len(dead)} of 1024 features never fire on these texts")
assert len(dead) < 50

# %% [markdown]
# ## 6. One token under the microscope
#
# A sports headline: which features of the attention SAE fire on its last line break? `share` compares the activation
# with the feature's strongest one anywhere, `density` says on which share of all tokens it fires. Look for a high share
# and a low density.

# %%
row = store.sql("""
    SELECT max(t.row) FROM tokens t JOIN documents d USING (doc)
    WHERE d.doc = 70 AND t.token = chr(10)
""").scalar()
fired = store.query("token_features", {"sae": attention, "row": row, "k": 6})
fired

# %% [markdown]
# One feature stands out. On which tokens of this document does it fire, and what are its strongest firings anywhere?

# %%
sports = max(fired.rows(), key=lambda one: one["share"] * (1 - one["density"]))["feature"]
store.query("feature_in_document", {"sae": attention, "doc": 70, "feature": sports}).plot()

# %%
store.query("max_activating", {"sae": attention, "feature": sports, "k": 8, "per_document": 1}).plot()

# %% [markdown]
# It begins with the word that gives sports away and stays on to the end of the text. The strongest examples are all of
# sports. But the strongest examples flatter: look also at the weak firings.

# %%
store.query("examples_by_interval", {"sae": attention, "feature": sports, "intervals": 5, "k": 2}).plot()

# %% [markdown]
# Below half of its strongest activation it fires on other things, too. So its meaning lies in *how strongly* it fires.

# %%
top = store.query("max_activating", {"sae": attention, "feature": sports, "k": 100})
topics = store.sql("SELECT doc, metadata ->> 'topic' AS topic FROM documents").df().set_index("doc")["topic"]
assert {topics[one["doc"]] for one in top.rows()} == {"sports"}

# %% [markdown]
# ## 7. Five topics: what tells them apart?
#
# We met the feature for sports by chance. `compare_groups` searches by plan: it compares two groups of documents, feature
# by feature, and puts the largest difference first. `effect` is the difference of the means in standard deviations, and
# `q` the chance of being fooled, corrected for the many features that were tried. Which groups there are, the documents'
# metadata say.

# %%
store.query("metadata_values", {"key": "topic", "k": 8})

# %% [markdown]
# For each topic, its headlines against all other headlines. Only documents up to 499 take part, so that the findings can
# be tried on the rest.

# %%
found = {}
for topic in ("sports", "politics", "science", "weather", "business"):
    rest = (
        "SELECT doc FROM documents WHERE metadata ->> 'kind' = 'headline' AND metadata ->> 'topic' <> ? AND doc < 500"
    )
    groups = {"a": f"topic={topic} & doc=0-499", "b": store.sql(rest, [topic]).numpy()["doc"].tolist()}
    found[topic] = store.query("compare_groups", {"sae": attention, **groups, "k": 3})
found["politics"]

# %% [markdown]
# The first one fires in every politics headline, and on average fifty times as strongly as in the others. The best of
# each of the five topics:

# %%
best = {topic: answer.rows()[0] for topic, answer in found.items()}
for topic, one in best.items():
    print(f"{topic:9} feature {one['feature']:3}: effect {one['effect']:4.1f}, q {one['q']:.0e}")
first = found["politics"].rows()[0]
assert first["fired_a"] == first["n_a"] and first["mean_a"] > 50 * first["mean_b"]
assert best["sports"]["feature"] == sports
assert all(one["effect"] > 8 and one["q"] < 0.05 for one in best.values())

# %% [markdown]
# Do they hold on headlines that took no part in the search? The guess for each headline is the topic whose feature is the
# strongest. (`feature_expression` gives documents × features: the mean activation over a document's tokens.)

# %%
features = {one["feature"]: topic for topic, one in best.items()}
matrix = store.query(
    "feature_expression", {"sae": attention, "docs": "kind=headline & doc=500-799", "features": list(features)}
).df()
guess = matrix.pivot(index="doc", columns="feature", values="activation").idxmax(axis=1).map(features)
right = (guess == topics[guess.index]).mean()
print(f"{right:.0%} of {len(guess)} unseen headlines are told rightly by five features")
assert right == 1

# %% [markdown]
# And without being told any topic? The same matrix for the first 54 headlines, with the 40 features that vary most between
# them. Headlines and features are put in the order of their likeness, as biologists order cells and genes.

# %%
expression = store.query("feature_expression", {"sae": attention, "docs": "kind=headline & doc=0-499", "k": 40})
expression.plot()

# %% [markdown]
# Five blocks, each with features of its own. Are they the topics? Cut the tree on the left into five, and count:

# %%
wide = expression.df().pivot(index="doc", columns="feature", values="activation")
blocks = fcluster(linkage(wide**0.5, "average"), 5, "maxclust")
counts = pandas.crosstab(topics[wide.index].rename("topic"), pandas.Series(blocks, wide.index, name="block"))
counts

# %% [markdown]
# Each block is one topic, whole, though no label went into the picture. Other features are shared: 337 is as strong in
# weather as in sports. What may it mean? `max_activating` would be the next question.

# %%
assert ((counts > 0).sum() == 1).all() and ((counts > 0).sum(axis=1) == 1).all()
assert wide[337].groupby(topics[wide.index]).mean()[["sports", "weather"]].min() > 2

# %% [markdown]
# ## 8. A summary
#
# What there is to know of an SAE before one trusts it, in one table. (`contents` and `health` say the same of the store.)

# %%
store.sql("""
    SELECT s.sae, s.site, s.width AS features,
           (SELECT count(*) FROM features f WHERE f.sae = s.sae AND n_firings = 0) AS dead,
           (SELECT sum(n_firings)::BIGINT FROM features f WHERE f.sae = s.sae) AS firings,
           (SELECT avg(l0) FROM reconstruction r JOIN tokens USING (row) WHERE r.sae = s.sae AND NOT is_special) AS l0,
           (SELECT value FROM health WHERE subject = s.sae AND name = 'sae_fvu') AS unexplained,
           (SELECT count(*) FROM health WHERE starts_with(subject, s.sae) AND NOT ok) AS failed_proofs
    FROM saes s
""")

# %% [markdown]
# **Where to go from here.** Name what you found, and the name appears in every answer: a file with the columns `sae`,
# `feature`, `label`, then `actstore label microscope.act names.csv`. [how_a_list_ends.ipynb](how_a_list_ends.ipynb) asks
# what features *do* to the model's answer; [logit_lens.ipynb](logit_lens.ipynb) and [attention.ipynb](attention.ipynb)
# look at the model without an SAE.
