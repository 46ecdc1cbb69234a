-- Which heads look from these tokens to those.
--
-- Each side is tokens by their texts, such as ' she| he', or rows; without either, every plain token looks and every
-- token is looked at. mean_weight is the weight of a looking token on all of the looked-at ones before it in its
-- sequence (and on itself, where it is one of them), averaged over the n_rows looking tokens that have any; what was
-- not kept counts as 0. n_edges are the edges kept, max_weight the heaviest, example where it is. Special, template and
-- repeated tokens do not look, unless their rows are given.
-- :from_tokens  texts = null      texts of the tokens that look
-- :to_tokens    texts = null      texts of the tokens looked at
-- :from_rows    integers = null   rows that look
-- :to_rows      integers = null   rows looked at
-- :doc          doc = null        one document only
-- :k            count = 10000     how many heads
-- :needs  heads  extract with --attention-top 8
WITH place AS (
    SELECT row, seq, token_id, NOT (is_special OR is_template OR is_repeat) AS plain
    FROM tokens WHERE $doc IS NULL OR doc = $doc
),
looking AS (
    SELECT row, seq FROM place
    WHERE ($from_tokens IS NULL OR token_id IN (SELECT token_id(unnest(CAST($from_tokens AS VARCHAR[])))))
      AND ($from_rows IS NULL OR list_contains(CAST($from_rows AS BIGINT[]), row))
      AND (plain OR $from_rows IS NOT NULL)
),
looked_at AS (
    SELECT row, seq FROM place
    WHERE ($to_tokens IS NULL OR token_id IN (SELECT token_id(unnest(CAST($to_tokens AS VARCHAR[])))))
      AND ($to_rows IS NULL OR list_contains(CAST($to_rows AS BIGINT[]), row))
),
able AS (
    SELECT l.row FROM looking l JOIN (SELECT seq, min(row) AS first FROM looked_at GROUP BY seq) k USING (seq)
    WHERE k.first <= l.row
),
layers AS (
    SELECT DISTINCT layer FROM heads
),
kept AS (
    SELECT layer, row, unnest(edges(layer, row), recursive := true) FROM layers CROSS JOIN able
),
met AS (
    SELECT layer, head, sum(weight::DOUBLE) AS weight, count(*) AS n_edges, max(weight) AS max_weight,
           arg_max(row, (weight, -row)) AS strongest
    FROM kept
    -- Every key is looked at where none is named: no table of all edges is built to find that out.
    WHERE ($to_tokens IS NULL AND $to_rows IS NULL) OR key_row IN (SELECT row FROM looked_at)
    GROUP BY layer, head
),
missing AS (
    SELECT min(row) AS row FROM (
        SELECT unnest(CAST($from_rows AS BIGINT[])) AS row
        UNION ALL
        SELECT unnest(CAST($to_rows AS BIGINT[]))
    ) WHERE row NOT IN (SELECT row FROM tokens)
),
n AS (
    SELECT CASE WHEN (SELECT row FROM missing) IS NULL THEN count(*)
                ELSE error('There is no row ' || (SELECT row FROM missing))::BIGINT END AS n_rows
    FROM able
),
ranked AS (
    SELECT h.layer, h.head, coalesce(m.weight, 0) / n.n_rows AS mean_weight, coalesce(m.n_edges, 0) AS n_edges,
           n.n_rows, m.max_weight, m.strongest
    FROM heads h LEFT JOIN met m USING (layer, head) CROSS JOIN n
    WHERE n.n_rows > 0
    ORDER BY mean_weight DESC, h.layer, h.head LIMIT $k
)
SELECT layer, head, mean_weight, n_rows, n_edges, max_weight, strongest AS row, snippet(strongest, 8, 2) AS example
FROM ranked
ORDER BY mean_weight DESC, layer, head;
