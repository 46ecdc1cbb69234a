# %% [markdown]
# # From vague to right: the logit lens
#
# A language model works on a text layer by layer. Between layers, every token has one vector: the *residual stream*,
# to which each layer adds something. At the very end this vector becomes a prediction of the next token: it is normed
# and compared with one vector for each word that the model knows.
#
# The **logit lens** ([nostalgebraist 2020](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens))
# takes this last step early, after every layer: *what would the model say if it had to answer now?*
#
# Here we watch a small model recall facts. It comes with actstore: Gemma 2's architecture, six layers, trained on a
# made-up world of people and towns. Nothing is downloaded, and the notebook runs in less than a minute.
# You need `pip install 'actstore[notebook]'`.

# %% [markdown]
# ## 1. Run the model once
#
# The model reads 201 documents about who lives where and does what. Stored are the residual stream after each layer,
# `resid_post.0` to `resid_post.5`, and the five likeliest tokens that the lens sees there. After this cell the model is
# not needed any more. Run the cell again, and it finds that nothing is left to do.

# %%
import actstore
from actstore.demo import assets

world = assets()
MODEL = world.model  # ← the line to change: MODEL = "google/gemma-2-2b"

texts = [one for one in world.documents() if one["kind"] in ("prompt", "fact")][:201]
actstore.extract(MODEL, texts, out="logit_lens.act", sites=["resid_post.*"], lens_k=5, dtype="float32")

store = actstore.open("logit_lens.act")
store.sql("SELECT count(DISTINCT doc) AS documents, count(*) AS tokens FROM tokens")

# %% [markdown]
# *With Gemma*, give it texts of your own: a list of strings, or the name of a file. It has never heard of these people.
# Lines that begin with `assert` check what is said here about the embedded model; leave them out then.

# %% [markdown]
# ## 2. One sentence
#
# The first document breaks off: *From the town records: Kira lives in*. The model has read many times where Kira lives,
# though never in these words: in Brenholm. In the picture each column is a token that it read, each line a layer, the
# deepest on top. A cell shows the token that this layer would say next, the darker the surer; a frame says that it is the
# one that came.

# %%
lens = store.lens("logit", doc=0)
lens.plot()

# %% [markdown]
# Read the last column from the bottom up. The first three layers only say again what was read, `in`. The fourth has
# understood that a town is wanted, but names the wrong one. The last two are right, and the last one is sure.
#
# The three best guesses of each layer at that place, with their probabilities, show how it happens: the town comes up
# from below. (`logit_lens` is a function that every SQL query can use; row 9 is the last token of this document.)

# %%
store.sql("""
    SELECT site, token, exp(logprob) AS probability
    FROM (SELECT site, layer, unnest(logit_lens(site, 9, 3), recursive := true) FROM sites)
    ORDER BY layer, probability DESC
""")

# %%
said = {one["site"]: one["token"] for one in lens.rows() if one["pos"] == 9}
assert said["resid_post.0"] == said["resid_post.1"] == said["resid_post.2"] == " in"
assert said["resid_post.3"] == " Farholt"
assert said["resid_post.4"] == said["resid_post.5"] == " Brenholm"

# %% [markdown]
# ## 3. All facts at once
#
# One sentence is an anecdote. The documents of this world say where their answers stand: `metadata` holds the place of
# each answer in the text. So one query can ask about every fact: how likely was the right answer after each layer,
# one token before it came? (`target` is the token that really came next.)

# %%
ANSWERS = """
    WITH places AS (SELECT doc, unnest(CAST(metadata -> 'fact' AS INTEGER[])) AS place FROM documents),
    answers AS (
        SELECT t.row - 1 AS row
        FROM places p JOIN tokens t ON t.doc = p.doc AND p.place >= t.char_start AND p.place < t.char_end
    )
"""
by_layer = store.sql(f"""
    {ANSWERS}
    SELECT l.site, count(*) AS facts,
           avg(CAST(target_rank = 1 AS INTEGER)) AS right_answers,
           avg(exp(target_logprob)) AS probability,
           median(target_rank) AS median_rank
    FROM lens_summary l JOIN answers USING (row)
    GROUP BY l.site ORDER BY l.site
""")
by_layer

# %% [markdown]
# The picture of one sentence holds for all 1,355 facts. After two layers the answer is nowhere. After the third one in
# five facts is there, after the fourth four in five, after the fifth nearly all. What remains for the last layer is
# to become sure: the mean probability of the right answer goes from 0.93 to 0.99.

# %%
right = [round(one["right_answers"], 2) for one in by_layer.rows()]
probability = [round(one["probability"], 2) for one in by_layer.rows()]
assert right == [0, 0, 0.20, 0.82, 1, 1], right
assert probability == [0, 0, 0.13, 0.53, 0.93, 0.99], probability
assert by_layer.rows()[0]["facts"] == 1355

# %% [markdown]
# ## 4. First sure and wrong, then vague, then right
#
# "From vague to right" is only half of it. *Entropy* says how vague a prediction is: 0 where the lens is sure, larger
# the more tokens it holds possible. Beside it stands how often the lens says again the token that was read.

# %%
vagueness = store.sql(f"""
    {ANSWERS}
    SELECT l.site,
           avg(l.entropy) AS entropy,
           avg(CAST(k.token_id = t.token_id AS INTEGER)) AS says_it_again,
           avg(CAST(k.token_id = p.top1_id AS INTEGER)) AS agrees_with_the_model
    FROM lens_summary l JOIN answers USING (row) JOIN tokens t USING (row) JOIN predictions p USING (row)
    JOIN lens_tokens k ON k.site = l.site AND k.row = l.row AND k.rank = 1
    GROUP BY l.site ORDER BY l.site
""")
vagueness

# %% [markdown]
# The early layers are not vague at all: they are sure, and wrong. In this model, as in Gemma, the vector by which a token
# goes in and the one by which it is predicted are the same but for a scale. So a residual stream to which little was
# added yet looks like the token that was read. Then the layers write over it: vaguest in the middle, right at the end.
#
# A word of warning follows: a high probability under the lens in an early layer is not the model's belief.

# %%
entropy = [round(one["entropy"], 1) for one in vagueness.rows()]
assert entropy == [0.1, 0.5, 2.8, 2.0, 0.4, 0.0], entropy
assert vagueness.rows()[0]["says_it_again"] == 1
assert vagueness.rows()[-1]["agrees_with_the_model"] == 1

# %% [markdown]
# The same course in one document, token by token. The thick line is the median over its tokens, the band holds the
# middle half of them. (KL says how far a layer's prediction is from the model's final one.)

# %%
store.query("lens_trajectory", {"doc": 1}).plot()

# %% [markdown]
# ## 5. Which layer decides?
#
# For each fact: the layer from which on the model's final answer stays on top.

# %%
decided = store.sql(f"""
    {ANSWERS}
    , leads AS (
        SELECT row, coalesce(max(s.layer) FILTER (k.token_id <> p.top1_id), -1) + 1 AS layer
        FROM answers JOIN lens_tokens k USING (row) JOIN predictions p USING (row) JOIN sites s USING (site)
        WHERE k.rank = 1 GROUP BY row
    )
    SELECT layer AS leads_from_layer, count(*) AS facts, count(*) / sum(count(*)) OVER () AS share
    FROM leads GROUP BY layer ORDER BY layer
""")
decided

# %% [markdown]
# Layer 3 decides three facts in five. That makes it the place to look more closely, and the notebook on the
# [microscope](microscope.ipynb) does so.

# %%
share = {one["leads_from_layer"]: round(one["share"], 2) for one in decided.rows()}
print(f"decided by layer 2: {share[2]:.0%}, by layer 3: {share[3]:.0%}, by layer 4: {share[4]:.0%}")
assert share[3] == max(share.values())

# %% [markdown]
# ## 6. Can the lens be trusted?
#
# At the last layer the lens must say exactly what the model said, or it was built wrongly: with another norm, or
# without Gemma's soft cap. The distance from the model's own prediction, over all tokens:

# %%
trust = store.sql("""
    SELECT site, avg(kl_to_final) AS mean_distance, max(kl_to_final) AS largest_distance
    FROM lens_summary GROUP BY site ORDER BY site DESC LIMIT 2
""")
trust

# %%
assert trust.rows()[0]["largest_distance"] < 1e-4

# %% [markdown]
# In earlier layers the lens reads a language that these layers do not quite speak yet. A *tuned lens*
# ([Belrose et al. 2023](https://arxiv.org/abs/2303.08112)) learns a small translation for each layer, from the stored
# residual streams and without the model: `actstore fit-lens logit_lens.act --out my-lens`, then
# `store.lens("tuned", doc=0, folder="my-lens")`.
#
# **Where to go from here.** `actstore queries` lists what else can be asked by name; `store.sql("SHOW TABLES")` what
# there is to ask with SQL. [attention.ipynb](attention.ipynb) shows how tokens look back at each other,
# [how_a_list_ends.ipynb](how_a_list_ends.ipynb) what it takes to stop.
