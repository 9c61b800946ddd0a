BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE deliveries (
	id INTEGER NOT NULL, 
	backend VARCHAR(128) NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(id) REFERENCES records (id) ON DELETE CASCADE
);
INSERT INTO "deliveries" VALUES(1,'scripted');
INSERT INTO "deliveries" VALUES(4,'scripted');
CREATE TABLE documents (
	run_id VARCHAR(128) NOT NULL, 
	document TEXT NOT NULL, 
	PRIMARY KEY (run_id), 
	FOREIGN KEY(run_id) REFERENCES "runs" (id) ON DELETE CASCADE
);
INSERT INTO "documents" VALUES('26e18070-62f8-404b-89ad-91338a292381','{"id":"26e18070-62f8-404b-89ad-91338a292381","backend":"scripted","config":{"model":"tiny-mistral","method":"sft","tuning":null,"data":{"train":[{"path":"{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4","weight":1.0}],"validation":[]},"hyperparameters":{"learning_rate":0.0001,"epochs":null,"training_steps":10,"batch_size":null,"seq_len":null,"weight_decay":null,"warmup_fraction":null,"fim_ratio":null,"seed":null},"suffix":"done","classifier_targets":[],"integrations":[],"budget":{"max_cost":null,"max_duration":null},"labels":{},"options":{}},"remote_id":"f1791825-d8cc-46d0-a795-7d1de2fbef6e","status":"completed","raw_status":null,"failure":null,"created_at":"2026-11-30T10:54:59.706693Z","started_at":"2026-11-30T10:55:01.141363Z","finished_at":"2026-11-30T10:55:01.151850Z","step":null,"total_steps":null,"metrics":{},"checkpoints":[],"result_model":"model","estimate":{"train_tokens":891,"data_tokens":891,"steps":10,"epochs":null,"hyperparameters":{},"costs":[],"cost":{"amount":"0","currency":"USD"},"cost_interval":null,"duration":null,"basis":"exact","interval":null,"price_source":null,"notes":[],"ours":null},"cost":null,"resumed_from":null,"changed_at":"2026-11-30T10:55:01.151845Z","place":null,"stale":null}');
INSERT INTO "documents" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75','{"id":"1c9d4d49-8407-4fb2-bfc4-162abe843e75","backend":"scripted","config":{"model":"tiny-mistral","method":"sft","tuning":null,"data":{"train":[{"path":"{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4","weight":1.0}],"validation":[]},"hyperparameters":{"learning_rate":0.0001,"epochs":null,"training_steps":10,"batch_size":null,"seq_len":null,"weight_decay":null,"warmup_fraction":null,"fim_ratio":null,"seed":null},"suffix":"live","classifier_targets":[],"integrations":[],"budget":{"max_cost":null,"max_duration":null},"labels":{},"options":{}},"remote_id":"7f5b2eb2-407c-4523-ae05-633a120b9772","status":"running","raw_status":null,"failure":null,"created_at":"2026-11-30T10:55:01.926788Z","started_at":"2026-11-30T10:55:01.949193Z","finished_at":null,"step":null,"total_steps":null,"metrics":{},"checkpoints":[],"result_model":null,"estimate":{"train_tokens":891,"data_tokens":891,"steps":10,"epochs":null,"hyperparameters":{},"costs":[],"cost":{"amount":"0","currency":"USD"},"cost_interval":null,"duration":null,"basis":"exact","interval":null,"price_source":null,"notes":[],"ours":null},"cost":null,"resumed_from":null,"changed_at":"2026-11-30T10:55:01.998414Z","place":null,"stale":null}');
CREATE TABLE "journal" (
	run_id VARCHAR(128) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	begun_at VARCHAR(40) NOT NULL, 
	result TEXT, 
	PRIMARY KEY (run_id, name), 
	FOREIGN KEY(run_id) REFERENCES "runs" (id) ON DELETE CASCADE
);
INSERT INTO "journal" VALUES('26e18070-62f8-404b-89ad-91338a292381','data files','2026-11-30T10:55:01.089201+00:00','[{"path": "{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4", "size": 891, "mtime_ns": 1796036099463624338, "sha256": "6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4"}]');
INSERT INTO "journal" VALUES('26e18070-62f8-404b-89ad-91338a292381','create','2026-11-30T10:55:01.125686+00:00','"f1791825-d8cc-46d0-a795-7d1de2fbef6e"');
INSERT INTO "journal" VALUES('26e18070-62f8-404b-89ad-91338a292381','launched','2026-11-30T10:55:01.294659+00:00','"f1791825-d8cc-46d0-a795-7d1de2fbef6e"');
INSERT INTO "journal" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75','data files','2026-11-30T10:55:01.932171+00:00','[{"path": "{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4", "size": 891, "mtime_ns": 1796036099463624338, "sha256": "6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4"}]');
INSERT INTO "journal" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75','create','2026-11-30T10:55:01.940643+00:00','"7f5b2eb2-407c-4523-ae05-633a120b9772"');
INSERT INTO "journal" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75','launched','2026-11-30T10:55:01.962252+00:00','"7f5b2eb2-407c-4523-ae05-633a120b9772"');
CREATE TABLE leases (
	token INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	name VARCHAR(200) NOT NULL, 
	owner VARCHAR(200) NOT NULL, 
	until VARCHAR(40) NOT NULL, 
	UNIQUE (name)
);
CREATE TABLE metrics (
	run_id VARCHAR(128) NOT NULL, 
	step INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	at VARCHAR(40) NOT NULL, 
	value FLOAT NOT NULL, 
	PRIMARY KEY (run_id, step, name), 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "metrics" VALUES('26e18070-62f8-404b-89ad-91338a292381',10,'train_loss','2026-11-30T10:55:01.151707+00:00',2.0);
INSERT INTO "metrics" VALUES('26e18070-62f8-404b-89ad-91338a292381',20,'train_loss','2026-11-30T10:55:01.151817+00:00',1.5);
INSERT INTO "metrics" VALUES('26e18070-62f8-404b-89ad-91338a292381',20,'valid_loss','2026-11-30T10:55:01.151817+00:00',1.6);
INSERT INTO "metrics" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75',10,'train_loss','2026-11-30T10:55:01.998389+00:00',3.0);
CREATE TABLE records (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	run_id VARCHAR(128) NOT NULL, 
	seq INTEGER NOT NULL, 
	at VARCHAR(40) NOT NULL, 
	level VARCHAR(16) NOT NULL, 
	source VARCHAR(64) NOT NULL, 
	step INTEGER, 
	message TEXT NOT NULL, 
	fields TEXT, 
	FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "records" VALUES(1,'26e18070-62f8-404b-89ad-91338a292381',1,'2026-11-30T10:55:01.151850+00:00','info','status',NULL,'completed','{"status": "completed", "raw_status": "completed"}');
INSERT INTO "records" VALUES(2,'26e18070-62f8-404b-89ad-91338a292381',2,'2026-11-30T10:55:01.151850+00:00','info','metrics',10,'step 10','{"train_loss": 2.0, "told_at": "2026-11-30T10:55:01.151707+00:00"}');
INSERT INTO "records" VALUES(3,'26e18070-62f8-404b-89ad-91338a292381',3,'2026-11-30T10:55:01.151850+00:00','info','metrics',20,'step 20','{"train_loss": 1.5, "valid_loss": 1.6, "told_at": "2026-11-30T10:55:01.151817+00:00"}');
INSERT INTO "records" VALUES(4,'1c9d4d49-8407-4fb2-bfc4-162abe843e75',1,'2026-11-30T10:55:01.949193+00:00','info','status',NULL,'running','{"status": "running", "raw_status": "running"}');
INSERT INTO "records" VALUES(5,'1c9d4d49-8407-4fb2-bfc4-162abe843e75',2,'2026-11-30T10:55:01.998389+00:00','info','metrics',10,'step 10','{"train_loss": 3.0}');
CREATE TABLE "runs" (
	id VARCHAR(128) NOT NULL, 
	backend VARCHAR(128) NOT NULL, 
	status VARCHAR(32) NOT NULL, 
	created_at VARCHAR(40) NOT NULL, 
	remote_id VARCHAR(256), 
	seen_at VARCHAR(40), 
	version INTEGER NOT NULL, 
	cursor TEXT, 
	whole BOOLEAN NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "runs" VALUES('26e18070-62f8-404b-89ad-91338a292381','scripted','completed','2026-11-30T10:54:59.706693+00:00','f1791825-d8cc-46d0-a795-7d1de2fbef6e','2026-11-30T10:55:01.584133+00:00',2,'1',1);
INSERT INTO "runs" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75','scripted','running','2026-11-30T10:55:01.926788+00:00','7f5b2eb2-407c-4523-ae05-633a120b9772','2026-11-30T10:55:03.480341+00:00',3,'0',0);
CREATE TABLE schema_version (
	version INTEGER NOT NULL
);
INSERT INTO "schema_version" VALUES(2);
CREATE TABLE uploads (
	scope VARCHAR(500) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	remote_id VARCHAR(256) NOT NULL, 
	uploaded_at VARCHAR(40) NOT NULL, 
	PRIMARY KEY (scope, sha256)
);
CREATE INDEX runs_by_status ON runs (status, backend, created_at);
CREATE INDEX runs_by_remote_id ON runs (remote_id);
CREATE UNIQUE INDEX records_by_run ON records (run_id, seq);
CREATE INDEX deliveries_by_backend ON deliveries (backend, id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('leases',17);
INSERT INTO "sqlite_sequence" VALUES('records',5);
COMMIT;
PRAGMA user_version=0;
