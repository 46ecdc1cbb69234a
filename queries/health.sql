-- What was proved while the store was made, and what was not.
--
-- ok is NULL where something could not be proved, for want of rows say. What is not ok comes first.
-- :all  boolean = true  also what is ok
SELECT name, subject, value, expected, ok
FROM health
WHERE $all OR ok IS DISTINCT FROM true
ORDER BY CASE WHEN ok THEN 2 WHEN ok IS NULL THEN 1 ELSE 0 END, name, subject;
