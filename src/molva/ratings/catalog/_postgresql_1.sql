-- Version 1 of the catalog in PostgreSQL. "molva." stands for the schema that a URL names.
-- A script that was released never changes. The row is Campaign(), which a test compares.

CREATE TABLE molva.campaign (
    name text COLLATE "C" PRIMARY KEY,
    question text NOT NULL,
    minimum integer NOT NULL,
    maximum integer NOT NULL,
    "window" bigint NOT NULL,
    CHECK (minimum < maximum)
);
INSERT INTO molva.campaign VALUES ('default', 'How do you like it?', 0, 10, 10);

-- One row: grows with every change. Whoever changes anything locks it first.
CREATE TABLE molva.revision (revision bigint NOT NULL);
INSERT INTO molva.revision VALUES (1);
