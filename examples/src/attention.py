# %% [markdown]
# # Who looks at whom: attention
#
# Attention is how one token of a text takes up something from earlier ones. A model has several *heads* in every layer.
# For each token, each head spreads a weight of 1 over this token and all before it: that is where the head looks.
#
# This notebook draws where heads look, finds out what each is for, and follows the best known circuit of small language
# models: **induction**, by which a model goes on with what it has seen before
# ([Olsson et al. 2022](https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads/index.html)).
#
# You need `pip install 'actstore[notebook]'` and less than a minute. The model comes with actstore.

# %% [markdown]
# ## 1. Run the model once
#
# The texts are 150 roll calls: names in a row, most of which come again in the same order. `attention_top=8` keeps, for
# every layer, head and token, the eight heaviest looks. That is far less than the whole pattern, whose size grows with
# the square of the length, and holds more than nine tenths of the weight. The sites are for the last question here.

# %%
import actstore
from actstore.demo import assets

world = assets()
MODEL = world.model  # ← the line to change: MODEL = "google/gemma-2-2b"

texts = [one for one in world.documents() if one["kind"] == "roll_call"][:150]
sites = ["resid_pre.0", "z.*", "mlp_out.*", "resid_post.*"]
actstore.extract(MODEL, texts, out="attention.act", attention_top=8, sites=sites, dtype="float32")

store = actstore.open("attention.act")
store.sql("SELECT doc, text FROM documents WHERE doc IN (6, 7, 17)")

# %% [markdown]
# *With Gemma* these texts do as well: every language model learns to repeat. Layers and heads will be others; lines that
# begin with `assert` check what is said here about the embedded model, so leave them out then.

# %% [markdown]
# ## 2. A heat map of every head of a layer
#
# Document 6 calls five names, four times over. A line is a token that looks, a column one that is looked at; the darker,
# the more weight. Nobody can look ahead, so the upper right is empty.

# %%
store.query("attention_pattern", {"doc": 6, "layer": 0}).plot()

# %% [markdown]
# Head 0 of layer 0 has one job: it looks at the token before. The others look at several places at once. Now the next
# layer.

# %%
store.query("attention_pattern", {"doc": 6, "layer": 1}).plot()

# %% [markdown]
# Head 0 of layer 1 is quite different. On the first five names there is nothing for it to see. From the second round on
# it draws stripes: at the second *Greta* it looks at *Ivan*, who followed the first *Greta*; at the second *Ivan* it
# looks at *Viktor*. It looks at **what came next the last time**. That is induction.

# %%
looks = store.query("attention_pattern", {"doc": 6, "layer": 1, "head": 0}).rows()
second_greta = max((one for one in looks if one["pos"] == 10), key=lambda one: one["weight"])
print(
    f"{second_greta['token']} at 10 looks at {second_greta['key_token']} at {second_greta['key_pos']}: "
    f"{second_greta['weight']:.0%}"
)
assert (second_greta["token"], second_greta["key_token"]) == (" Greta", " Ivan")
assert store.sql("SELECT avg(kept_weight) FROM attention_rows").scalar() > 0.9

# %% [markdown]
# ## 3. A score for every head
#
# One picture of one text may be chance. So all tokens of all texts were counted while they were extracted: how much
# of its weight does each head put on the token before, on the token itself, on the very first token (BOS, the beginning
# of the sequence), and on what followed the earlier occurrences of the token?

# %%
scores = store.query("head_scores")
scores.plot()

# %%
best = store.query("head_scores", {"by": "induction", "k": 3})
best

# %% [markdown]
# Two heads stand out of the 24: one for the previous token, in layer 0, and one for induction, in layer 1. No other
# head has an induction score above 0.2.
#
# They need each other. To know that *Ivan* came after *Greta*, somebody must have noted, at *Ivan*, who stood before;
# that is what the first head does, and the second head searches these notes. (An honest remark: so that the embedded
# model has this circuit after a few minutes of training, these two heads were given a faint start; see
# `world/README.md`. In large models it appears by itself.)

# %%
by_head = {(one["layer"], one["head"]): one for one in scores.rows()}
assert by_head[0, 0]["previous_token"] > 0.95 and by_head[1, 0]["induction"] > 0.95
assert all(one["induction"] < 0.2 for place, one in by_head.items() if place != (1, 0))
print(f"previous token: {by_head[0, 0]['previous_token']:.3f}, induction: {by_head[1, 0]['induction']:.3f}")

# %% [markdown]
# ## 4. Examples and counter-examples
#
# The strongest looks of the induction head, with both ends in their context. Which tokens appear here tells what a head
# is for, as the strongest examples of a feature do.

# %%
store.query("head_edges", {"layer": 1, "head": 0, "doc": 6, "k": 8})

# %% [markdown]
# And the other way round: given two tokens, which heads look from the one to the other?

# %%
between = store.query("attention_between", {"from_tokens": " Greta", "to_tokens": " Ivan", "doc": 6})
between.plot()

# %%
assert (between.rows()[0]["layer"], between.rows()[0]["head"]) == (1, 0)

# %% [markdown]
# Where does the head look when a name is new and there is nothing to find? Its weights must add up to 1 all the same.
# The query below asks separately for names that are new and names that come again.

# %%
NAMES = """
    WITH names AS (
        SELECT row, token_id, row_number() OVER (PARTITION BY doc, token_id ORDER BY row) > 1 AS again
        FROM tokens WHERE regexp_matches(token, '^ [A-Z][a-z]+$')
    )
"""
rest = store.sql(f"""
    {NAMES}
    SELECT n.again, count(DISTINCT n.row) AS names,
           sum(a.weight) FILTER (k.pos = 0) / count(DISTINCT n.row) AS on_bos,
           sum(a.weight) FILTER (k.pos BETWEEN 1 AND 4) / count(DISTINCT n.row) AS on_the_heading
    FROM names n JOIN attention a ON a.row = n.row AND a.layer = 1 AND a.head = 0 JOIN tokens k ON k.row = a.key_row
    GROUP BY n.again ORDER BY n.again
""")
rest

# %% [markdown]
# It looks at BOS and at the heading, where it disturbs nothing: an *attention sink*. Most heads of large models spend
# most of their weight so, which is why `head_edges` leaves looks at BOS out unless it is asked for them.

# %%
new, again = rest.rows()
assert new["on_bos"] + new["on_the_heading"] > 0.85 and again["on_bos"] + again["on_the_heading"] < 0.01

# %% [markdown]
# ## 5. Does it help?
#
# A head that looks at the right place need not matter. First: does the model know the next name when it comes again?
# `predictions` holds the model's own probabilities; *surprise* is the negative logarithm of the probability of the name
# that came, in nats.

# %%
surprise = store.sql(f"""
    {NAMES}
    SELECT n.again, count(*) AS names, avg(-p.target_logprob) AS surprise,
           avg(CAST(p.top1_id = p.target_id AS INTEGER)) AS guessed_right
    FROM names n JOIN predictions p ON p.row = n.row - 1
    GROUP BY n.again ORDER BY n.again
""")
surprise

# %% [markdown]
# A new name is a guess among eighty. One that comes again is foretold nearly always.
#
# Second: is it this head that brings the name? The last residual stream is a sum of what the embedding and every head
# and MLP wrote, so the score (*logit*) of the name that comes next is a sum, too. `attribution` tells the parts. Here
# they are averaged over all places at which both this name and the next one come again, each measured against the mean
# of all tokens (`-1`).

# %%
parts = store.sql(f"""
    {NAMES},
    places AS (
        SELECT n.row - 1 AS row, n.token_id FROM names n JOIN names b ON b.row = n.row - 1 WHERE n.again AND b.again
    ),
    parts AS (SELECT unnest(attribution(row, token_id, -1, NULL), recursive := true) FROM places)
    SELECT component, layer, head, avg(contribution) AS contribution, count(*) AS places
    FROM parts GROUP BY ALL ORDER BY contribution DESC LIMIT 8
""")
parts

# %% [markdown]
# Among the heads, the induction head brings by far the most. The embedding comes first for a dull reason: the token that
# predicts is a name itself, and names resemble each other. The late MLPs make the decision firm.

# %%
heads = [one for one in parts.rows() if one["component"] == "head"]
assert (heads[0]["layer"], heads[0]["head"]) == (1, 0)
assert heads[0]["contribution"] > 2 * heads[1]["contribution"]
known = surprise.rows()[1]
print(
    f"{known['guessed_right']:.0%} of the names that come again are foretold; the induction head adds "
    f"{heads[0]['contribution']:.1f} to their logit, the next head {heads[1]['contribution']:.1f}"
)

# %% [markdown]
# **Where to go from here.** `attention_top` keeps the heaviest looks; `sites=["pattern.1"]` stores the whole pattern of
# layer 1, and `attention_pattern` then shows every weight. [logit_lens.ipynb](logit_lens.ipynb) watches a prediction
# form, [microscope.ipynb](microscope.ipynb) reads what is inside a vector.
