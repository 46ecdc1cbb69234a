-- What each part of the model adds to a token's logit, or to the difference of two: the logit prism.
--
-- The last residual stream is a sum; with the final norm's scale as it was, so is the logit before the soft cap.
-- contribution is a part's share; embedding, heads (where z is stored; else attn_out), mlp_out, biases, rounding (what
-- storing rounded numbers leaves) add up to total. logit is after the cap, of the token alone. Where the
-- first sites are not stored, it begins with a later state of the stream, such as resid_post.12. With an SAE, what it
-- reconstructs is told apart into features, feature_bias and feature_error. Without a token: the model's own prediction.
-- :row         row               the row that predicts
-- :token       text = null       the predicted token, as `vocabulary` shows it
-- :token_id    integer = null    or its id
-- :against     text = null       another token: the difference of the two logits
-- :against_id  integer = null    or its id; -1: the mean of all tokens, without which a constant that all share counts
-- :sae         sae = null        tell this SAE's features apart
-- :k           count = 30        how many parts, largest first
WITH asked AS (
    SELECT CAST($row AS BIGINT) AS row, CASE
               WHEN $token IS NOT NULL AND $token_id IS NOT NULL THEN error('Give token or token_id, not both')
               WHEN $against IS NOT NULL AND $against_id IS NOT NULL THEN error('Give against or against_id, not both')
               WHEN greatest($token_id, $against_id) > 2147483647  -- no INTEGER; NULL is not the greatest
               THEN error('There is no token ' || greatest($token_id, $against_id))
               ELSE coalesce($token_id, token_id($token), (SELECT top1_id FROM predictions WHERE row = $row),
                             error('Give token or token_id: this store has no predictions, or not this row'))
           END::INTEGER AS token_id,
           coalesce($against_id, token_id($against))::INTEGER AS against
),
parts AS (
    SELECT row, token_id, unnest(attribution(row, token_id, against, $sae), recursive := true) FROM asked
),
whole AS (
    SELECT sum(contribution) AS total FROM parts
),
logits AS (
    SELECT lens_logits(site, row, [token_id])[1] AS logit
    FROM asked CROSS JOIN (SELECT site FROM sites WHERE kind = 'resid_post' ORDER BY layer DESC LIMIT 1)
)
SELECT p.component, p.layer, p.head, p.feature, f.label, p.contribution, v.token, w.total, l.logit
FROM parts p JOIN vocabulary v USING (token_id) CROSS JOIN whole w CROSS JOIN logits l
LEFT JOIN features f ON f.sae = $sae AND f.feature = p.feature
ORDER BY abs(p.contribution) DESC, p.layer, p.head, p.feature
LIMIT $k;
