-- Examples of a feature across its whole range of activations, not only the strongest.
--
-- (0, maximum] is cut into equal intervals, the strongest first. Of each, per_interval firings are shown that lie evenly
-- spread over the corpus, so the answer is the same every time; n_firings counts all of the interval's. Plain rows only.
-- :sae           sae            the SAE's id
-- :feature       feature        the feature
-- :intervals     integer = 10   how many intervals
-- :per_interval  integer = 5    examples of each
-- :before        integer = 10   tokens shown before
-- :after         integer = 10   tokens shown after
WITH firing AS (
    SELECT a.row, a.activation, t.doc, t.pos, t.token
    FROM activations a JOIN tokens t USING (row)
    WHERE a.sae = $sae AND a.feature = $feature AND NOT (t.is_special OR t.is_template OR t.is_repeat)
),
strongest AS (SELECT max(activation)::DOUBLE AS maximum FROM firing),
placed AS (
    SELECT f.*, s.maximum,
           least($intervals - 1, CAST(floor($intervals * (f.activation::DOUBLE / s.maximum)) AS INTEGER)) AS bin
    FROM firing f CROSS JOIN strongest s
),
numbered AS (
    SELECT *, row_number() OVER (PARTITION BY bin ORDER BY row) - 1 AS place,
           count(*) OVER (PARTITION BY bin) AS n_firings
    FROM placed
)
SELECT maximum * bin / $intervals AS above, maximum * (bin + 1) / $intervals AS up_to, n_firings, activation, token,
       snippet(row, $before, $after) AS example, doc, pos, row
FROM numbered
-- The first firing of each of per_interval runs of equal length.
WHERE place = 0 OR place * $per_interval // n_firings > (place - 1) * $per_interval // n_firings
ORDER BY bin DESC, activation DESC, row;
