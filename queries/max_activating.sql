-- The strongest firings of a feature, each in its context.
--
-- With per_document at most so many of each document are shown, the strongest; n_merged then counts all firings of
-- the feature in that document. Special, template and repeated tokens are left out. Ties go by row.
-- :sae           sae          the SAE's id
-- :feature       feature      the feature
-- :k             count = 20   how many
-- :per_document  amount = 0   at most so many of one document; 0: no limit
-- :before        amount = 10  tokens shown before
-- :after         amount = 10  tokens shown after
-- :up-to k=100 per_document=0
-- The index holds the strongest 100 of every feature as they are: nothing else is read.
SELECT activation, here.token, example, here.doc, here.pos, row, NULL::BIGINT AS n_merged
FROM (
    SELECT row, activation, token_at(row) AS here, snippet(row, $before, $after) AS example FROM examples
    WHERE sae = $sae AND feature = $feature AND rank <= $k
)
ORDER BY activation DESC, row LIMIT $k;
-- :else
WITH placed AS (
    SELECT a.row, a.activation, t.doc, t.pos, t.token,
           row_number() OVER (PARTITION BY t.doc ORDER BY a.activation DESC, a.row) AS place,
           count(*) OVER (PARTITION BY t.doc) AS n_merged
    FROM activations a JOIN tokens t USING (row)
    WHERE a.sae = $sae AND a.feature = $feature AND NOT (t.is_special OR t.is_template OR t.is_repeat)
),
chosen AS (
    SELECT * FROM placed
    WHERE $per_document < 1 OR place <= $per_document
    ORDER BY activation DESC, row LIMIT $k
)
SELECT activation, token, snippet(row, $before, $after) AS example, doc, pos, row,
       CASE WHEN $per_document > 0 THEN n_merged END AS n_merged
FROM chosen
ORDER BY activation DESC, row LIMIT $k;
