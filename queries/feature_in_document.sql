-- How strongly a feature fires on every token of a document: its text, to be shaded.
--
-- One line per token, in order; activation is 0 where the feature does not fire. share is the activation over the
-- feature's strongest one in the store.
-- :doc      doc      the document
-- :sae      sae      the SAE's id
-- :feature  feature  the feature
WITH place AS (
    SELECT row, seq, pos, token, firings($sae, row) AS fired FROM tokens WHERE doc = $doc
),
fired AS (
    SELECT row, seq, pos, token,
           coalesce(list_filter(fired, lambda one: one.feature = $feature)[1].activation, 0) AS activation
    FROM place
)
SELECT f.seq, f.pos, f.row, f.token, f.activation, f.activation / nullif(s.max_activation, 0) AS share
FROM fired f JOIN features s ON s.sae = $sae AND s.feature = $feature
ORDER BY f.row;
