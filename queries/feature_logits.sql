-- The tokens that a feature's direction raises and lowers most in the model's answer.
--
-- Direction · final-norm gain · unembedding, before the soft cap, minus the vocabulary's mean: the direct path, without
-- what later layers make of it. Norm scales are left out: they change the logits' size and not their order.
-- :sae      sae      the SAE's id
-- :feature  feature  the feature
-- :needs  feature_logits  store an SAE whose site writes into the residual stream
SELECT CASE WHEN l.rank > 0 THEN 'raised' ELSE 'lowered' END AS side, abs(l.rank) AS rank, v.token, l.token_id,
       l.logit
FROM feature_logits l JOIN vocabulary v USING (token_id)
WHERE l.sae = $sae AND l.feature = $feature
ORDER BY side DESC, rank;
