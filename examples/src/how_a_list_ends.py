# %% [markdown]
# # How a list ends
#
# A model that writes a list has to stop somewhere. How does it know that the last item was the last? In the made-up world
# of actstore's embedded model the question has a clear answer: a *short* list of metals has three items, a short list of
# tools five, and *long* lists eight or nine, depending on the topic. Nobody told the model; it learned from examples.
#
# This notebook looks for the stop inside. Which features fire where a list ends, and not where it goes on? Which parts of
# the model speak for stopping? You need `pip install 'actstore[notebook]'` and about a minute.

# %% [markdown]
# ## 1. Run the model once
#
# 373 lists, which the model has not seen before, go through it once. Stored are the features of three sparse autoencoders
# (SAEs; see [microscope.ipynb](microscope.ipynb)) on the residual stream after layers 1, 3 and 5, and everything that is
# added up in the residual stream: the embedding (`resid_pre.0`), the attention heads (`z`) and the MLPs (`mlp_out`).

# %%
import pandas
from scipy.cluster.hierarchy import fcluster, linkage

import actstore
from actstore.demo import assets

world = assets()
MODEL = world.model  # ← the line to change: MODEL = "google/gemma-2-2b"
SAE = f"{world.model.parent}/gemma-scope-demo-res/layer_*/width_1k/average_l0_14"
# and with it SAE = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"

texts = [one for one in world.documents() if one["kind"] == "list"]
sites = ["resid_pre.0", "z.*", "mlp_out.*", "resid_post.*"]
actstore.extract(MODEL, texts, out="how_a_list_ends.act", sites=sites, saes=[SAE], dtype="float32")

store = actstore.open("how_a_list_ends.act")
first, *_, last = store.saes
store.sql("SELECT doc, metadata ->> 'length' AS length, text FROM documents WHERE doc IN (0, 2, 32)")

# %% [markdown]
# *With Gemma*, write some lists of your own. Lines that begin with `assert` check what is said here about the embedded
# model; leave them out then.

# %% [markdown]
# ## 2. Where the decision falls
#
# After each item comes a line break, and behind it either the next item (`-`, or a number) or a second line break: the
# end. So the decision falls **on the line break behind an item**. The documents' metadata say which one ends the list.

# %%
BREAKS = """
    WITH lists AS (
        SELECT doc, metadata ->> 'length' AS length, CAST(metadata -> 'list_stop' ->> 0 AS INTEGER) AS stop
        FROM documents
    ),
    breaks AS (
        SELECT t.row, t.doc, l.length, t.char_start = l.stop AS ends,
               row_number() OVER (PARTITION BY t.doc ORDER BY t.row) - 1 AS item
        FROM tokens t JOIN lists l USING (doc)
        WHERE t.token = chr(10) AND t.char_start <= l.stop
        QUALIFY item > 0
    )
"""
decisions = store.sql(f"""
    {BREAKS}
    SELECT length, ends, count(*) AS line_breaks, min(item) AS first_item, max(item) AS last_item,
           avg(CAST(p.top1_id = p.target_id AS INTEGER)) AS foretold, avg(exp(p.target_logprob)) AS probability
    FROM breaks JOIN predictions p USING (row)
    GROUP BY length, ends ORDER BY length DESC, ends
""")
decisions

# %% [markdown]
# The model is right every time, and sure. Short lists end after three to five items, long ones after eight or nine, and
# it never goes on too long, nor stops early. It must know the topic, know the length that was asked for, and count.

# %%
assert all(one["foretold"] == 1 and one["probability"] > 0.99 for one in decisions.rows())
ends = sum(one["line_breaks"] for one in decisions.rows() if one["ends"])
goes_on = sum(one["line_breaks"] for one in decisions.rows()) - ends
print(f"{ends} line breaks that end a list and {goes_on} that do not, all foretold")

# %% [markdown]
# ## 3. Lists × features
#
# How do lists differ for the model? Biologists lay out which genes are expressed in which cells; here it is features in
# documents. Forty lists, and the forty features of layer 1 whose mean activation varies most between them; both sides
# are put in the order of their likeness.

# %%
expression = store.query("feature_expression", {"sae": first, "docs": "doc=0-39", "k": 40})
expression.plot()

# %% [markdown]
# Two blocks. Short and long lists? No: lists with dashes, and lists with numbers.

# %%
wide = expression.df().pivot(index="doc", columns="feature", values="activation")
blocks = pandas.Series(fcluster(linkage(wide**0.5, "average"), 2, "maxclust"), wide.index, name="block")
numbered = store.sql("SELECT doc, text LIKE '%1. %' AS numbered FROM documents").df().set_index("doc")["numbered"]
counts = pandas.crosstab(numbered[wide.index], blocks)
counts

# %%
assert sorted(counts.to_numpy().ravel().tolist()) == [0, 0, 19, 21]

# %% [markdown]
# A picture shows the largest difference, not the one that you are after. So ask for it: which features tell long lists
# from short ones?

# %%
lengths = store.query("compare_groups", {"sae": first, "a": "length=long", "b": "length=short", "k": 4})
lengths

# %% [markdown]
# There they are, and they are the words themselves: features that fire on *long* and on *short* in the heading. This is
# where the model learns how long the list shall be. It is not yet where it stops. Beware of such findings: the features
# differ, with overwhelming significance, and still are not the answer to the question.

# %%
assert "« long»" in lengths.rows()[0]["example"] and "« short»" in lengths.rows()[1]["example"]

# %% [markdown]
# ## 4. The features of the stop
#
# Now the question put rightly, token by token: which features fire on line breaks that end a list, and not on those
# behind which it goes on?

# %%
breaks = store.sql(f"{BREAKS} SELECT row, ends FROM breaks ORDER BY row").numpy()
ending, going_on = breaks["row"][breaks["ends"]], breaks["row"][~breaks["ends"]]
rates = []
for sae in store.saes:
    best = store.query("features_for_tokens", {"sae": sae, "rows": ending, "not_rows": going_on, "k": 1}).rows()[0]
    rates.append((best["rate_here"], best["rate_there"]))
    print(f"{sae}: {best['feature']:3} fires on {rates[-1][0]:.1%} of the ends, on {rates[-1][1]:.1%} of the others")

# %% [markdown]
# After layer 1 no feature knows. After layer 3 several half know. After layer 5 there is one that fires on every end, and
# next to never elsewhere. In between lies the decision. The features of layer 5 for *stop*, and the other way round those
# for *go on*:

# %%
stop = store.query("features_for_tokens", {"sae": last, "rows": ending, "not_rows": going_on, "k": 5})
stop

# %%
go_on = store.query("features_for_tokens", {"sae": last, "rows": going_on, "not_rows": ending, "k": 3})
go_on

# %%
(early, _), (middle, middle_else), (late, late_else) = rates
assert early < 0.3 and middle > 0.9 and middle_else > 0.1 and late == 1 and late_else < 0.002

# %% [markdown]
# These eight features on every token of a short and of a long list of metals:

# %%
features = [one["feature"] for one in (*stop.rows(), *go_on.rows())]
store.query("token_expression", {"sae": last, "docs": "doc=0,32", "features": features}).plot()

# %% [markdown]
# Read it from the top. Three features fire behind the heading and behind every item: they seem to say *now comes a line
# break*. Three fire on the line breaks: *now comes a dash*. On the last line break the dash all but falls silent, and the
# features for a line break fire once more. So that is how a list ends: the model says again what it says after every
# item. The other two, 871 and 65, appear only around the end.
#
# What do they write? Each feature has a direction, and the direction speaks for some tokens and against others.

# %%
says_break, says_dash = stop.rows()[4]["feature"], go_on.rows()[2]["feature"]
store.query("feature_logits", {"sae": last, "feature": says_break, "k": 2})

# %%
store.query("feature_logits", {"sae": last, "feature": says_dash, "k": 2})

# %%
spoken = "SELECT token FROM feature_logits JOIN vocabulary USING (token_id) WHERE sae = ? AND feature = ? AND rank = 1"
assert store.sql(spoken, [last, says_break]).scalar() == "\n"
assert store.sql(spoken, [last, says_dash]).scalar() == "-"

# %% [markdown]
# ## 5. Who speaks for the stop? Direct attribution
#
# The model's score (*logit*) for a token is a sum of what the embedding, every head and every MLP wrote. `direct_attribution`
# takes it apart. Here, on the last line break of document 0: a second line break *against* a dash. What is positive speaks
# for the stop. `total` is the sum of all parts.

# %%
row = int(ending[0])
prism = store.query("direct_attribution", {"row": row, "token": "\n", "against": "-", "k": 8})
prism

# %% [markdown]
# The embedding leads, but it would do so on every line break. What counts is the difference to the line breaks behind
# which the list goes on. So: the same for all lists with dashes, the heads of a layer taken together.

# %%
parts = store.sql(f"""
    {BREAKS},
    dashed AS (SELECT row, ends FROM breaks WHERE doc IN (SELECT doc FROM tokens WHERE token = '-')),
    parts AS (
        SELECT row, ends, unnest(attribution(row, token_id(chr(10)), token_id('-'), NULL), recursive := true)
        FROM dashed
    )
    SELECT CASE component WHEN 'head' THEN 'attention ' || layer WHEN 'mlp_out' THEN 'MLP ' || layer
                          ELSE component END AS part,
           sum(contribution) FILTER (ends) / count(DISTINCT row) FILTER (ends) AS "the list ends",
           sum(contribution) FILTER (NOT ends) / count(DISTINCT row) FILTER (NOT ends) AS "it goes on"
    FROM parts WHERE component <> 'rounding'
    GROUP BY part, layer ORDER BY layer NULLS FIRST, min(component)
""")
means = parts.df().set_index("part")
axes = means.plot.barh(figsize=(7, 4.5), width=0.8, color=["#1d456d", "#b8cfc6"])
axes.set(title="A line break against a dash", xlabel="mean contribution to the difference of the two logits", ylabel="")
axes.axvline(0, color="#8a8a8a", lw=0.6)
axes.invert_yaxis()

# %% [markdown]
# The embedding and the early layers differ little: what they say, they say on every line break. The MLPs of layers 3, 4
# and 5 make the difference, more from layer to layer. That fits with section 4: the stop is not there after layer 1, half
# there after layer 3, and clear after layer 5.

# %%
difference = means["the list ends"] - means["it goes on"]
share = difference[["MLP 3", "MLP 4", "MLP 5"]].sum() / difference.sum()
print(f"the difference is {difference.sum():.1f}; {share:.0%} of it comes from the MLPs of layers 3 to 5")
assert difference.nlargest(3).index.tolist() == ["MLP 5", "MLP 4", "MLP 3"]

# %% [markdown]
# With an SAE on the last residual stream, the same score is taken apart into features.

# %%
prism = store.query("direct_attribution", {"row": row, "token": "\n", "against": "-", "sae": last, "k": 6})
prism

# %% [markdown]
# The three features that say *line break* carry the decision, as the picture in section 4 let us expect. The sum is exact:
# biases, the SAE's error and what rounding leaves are parts of it, too.

# %%
whole = store.query("direct_attribution", {"row": row, "token": "\n", "against": "-", "sae": last, "k": 1000}).rows()
assert abs(sum(one["contribution"] for one in whole) - whole[0]["total"]) < 1e-4
assert {one["feature"] for one in whole if one["feature"] and one["contribution"] > 1.5} == {63, 803, 1013}

# %% [markdown]
# **What this does not show.** Attribution is direct: it tells who writes the answer, not who told the writer. The heads
# that carry topic, length and count to the line break act through the MLPs and do not show up. And the features were
# sought among lists only; on other texts they may fire for other reasons. `max_activating` over a mixed corpus would
# tell, as in [microscope.ipynb](microscope.ipynb).
