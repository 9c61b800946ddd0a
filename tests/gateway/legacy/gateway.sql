BEGIN TRANSACTION;
CREATE TABLE checkpoints (
	job_id VARCHAR(36) NOT NULL, 
	step INTEGER NOT NULL, 
	created_at FLOAT NOT NULL, 
	train_loss FLOAT, 
	valid_loss FLOAT, 
	valid_mean_token_accuracy FLOAT, 
	PRIMARY KEY (job_id, step)
);
INSERT INTO "checkpoints" VALUES('26e18070-62f8-404b-89ad-91338a292381',10,1796036101.15185,2.0,NULL,NULL);
INSERT INTO "checkpoints" VALUES('26e18070-62f8-404b-89ad-91338a292381',20,1796036101.15185,1.5,1.6,NULL);
INSERT INTO "checkpoints" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75',10,1.79603610199838900564e+09,3.0,NULL,NULL);
CREATE TABLE events (
	id INTEGER NOT NULL, 
	job_id VARCHAR(36) NOT NULL, 
	name VARCHAR NOT NULL, 
	data JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "events" VALUES(1,'26e18070-62f8-404b-89ad-91338a292381','status-updated','{"status": "QUEUED"}',1.79603609957035064694e+09);
INSERT INTO "events" VALUES(2,'26e18070-62f8-404b-89ad-91338a292381','status-updated','{"status": "VALIDATING"}',1.79603609960646128651e+09);
INSERT INTO "events" VALUES(3,'26e18070-62f8-404b-89ad-91338a292381','status-updated','{"status": "VALIDATED"}',1.79603609965774035448e+09);
INSERT INTO "events" VALUES(4,'26e18070-62f8-404b-89ad-91338a292381','status-updated','{"status": "SUCCESS"}',1.79603610181735610963e+09);
INSERT INTO "events" VALUES(5,'1c9d4d49-8407-4fb2-bfc4-162abe843e75','status-updated','{"status": "QUEUED"}',1.79603610189873313905e+09);
INSERT INTO "events" VALUES(6,'1c9d4d49-8407-4fb2-bfc4-162abe843e75','status-updated','{"status": "VALIDATING"}',1.79603610191329550742e+09);
INSERT INTO "events" VALUES(7,'1c9d4d49-8407-4fb2-bfc4-162abe843e75','status-updated','{"status": "VALIDATED"}',1.7960361019176065922e+09);
INSERT INTO "events" VALUES(8,'1c9d4d49-8407-4fb2-bfc4-162abe843e75','status-updated','{"status": "RUNNING"}',1.79603610197922492026e+09);
INSERT INTO "events" VALUES(9,'9b9bb55e-8dfd-42c3-8c2b-5b2d03091bdc','status-updated','{"status": "QUEUED"}',1.79603610224576663977e+09);
INSERT INTO "events" VALUES(10,'9b9bb55e-8dfd-42c3-8c2b-5b2d03091bdc','status-updated','{"status": "VALIDATING"}',1.79603610228139066694e+09);
INSERT INTO "events" VALUES(11,'145b6fe8-01c6-48b7-9b18-05299a6800c0','status-updated','{"status": "QUEUED"}',1.79603610230240941054e+09);
INSERT INTO "events" VALUES(12,'9b9bb55e-8dfd-42c3-8c2b-5b2d03091bdc','status-updated','{"status": "VALIDATED"}',1.7960361023098168373e+09);
INSERT INTO "events" VALUES(13,'145b6fe8-01c6-48b7-9b18-05299a6800c0','status-updated','{"status": "VALIDATING"}',1796036102.32768);
INSERT INTO "events" VALUES(14,'145b6fe8-01c6-48b7-9b18-05299a6800c0','status-updated','{"status": "VALIDATED"}',1.7960361023782775402e+09);
CREATE TABLE files (
	id VARCHAR(36) NOT NULL, 
	filename VARCHAR NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	bytes INTEGER NOT NULL, 
	purpose VARCHAR NOT NULL, 
	sample_type VARCHAR NOT NULL, 
	source VARCHAR NOT NULL, 
	num_lines INTEGER, 
	mimetype VARCHAR, 
	visibility VARCHAR, 
	created_at FLOAT NOT NULL, 
	created_by VARCHAR NOT NULL, 
	expires_at FLOAT, 
	deleted_at FLOAT, 
	project VARCHAR DEFAULT 'default' NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "files" VALUES('f0d4b944-e8b5-43c5-831a-cde4c8cf578d','train.jsonl','6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4',891,'fine-tune','instruct','upload',8,'application/jsonl','workspace',1.79603609946403503416e+09,'static',NULL,NULL,'default');
CREATE TABLE jobs (
	id VARCHAR(36) NOT NULL, 
	backend VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	job_type VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	suffix VARCHAR, 
	auto_start BOOLEAN NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	created_by VARCHAR NOT NULL, 
	modified_at FLOAT NOT NULL, 
	started_at FLOAT, 
	launched BOOLEAN NOT NULL, 
	training_files JSON NOT NULL, 
	validation_files JSON NOT NULL, 
	blobs JSON NOT NULL, 
	hyperparameters JSON NOT NULL, 
	classifier_targets JSON NOT NULL, 
	context_length INTEGER NOT NULL, 
	integrations JSON NOT NULL, 
	wandb_project VARCHAR, 
	wandb_name VARCHAR, 
	config TEXT NOT NULL, 
	quote JSON, 
	log_cursor VARCHAR, 
	trained_tokens INTEGER, 
	fine_tuned_model VARCHAR, 
	project VARCHAR DEFAULT 'default' NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('26e18070-62f8-404b-89ad-91338a292381','scripted','tiny-mistral','completion','SUCCESS','done',1,'3f292bd4dbe95986321924c866e82079856728672ff079de1bc830f632a5f59b',1.79603609957035064694e+09,'static',1.79603610181735610963e+09,1.79603609967533969877e+09,1,'[{"file_id": "f0d4b944-e8b5-43c5-831a-cde4c8cf578d", "weight": 1.0}]','[]','["6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4"]','{"training_steps": 10, "learning_rate": 0.0001}','[]',2048,'[]',NULL,NULL,'{"model":"tiny-mistral","method":"sft","tuning":null,"data":{"train":[{"path":"{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4","weight":1.0}],"validation":[]},"hyperparameters":{"learning_rate":0.0001,"epochs":null,"training_steps":10,"batch_size":null,"seq_len":null,"weight_decay":null,"warmup_fraction":null,"fim_ratio":null,"seed":null},"suffix":"done","classifier_targets":[],"integrations":[],"budget":{"max_cost":null,"max_duration":null},"labels":{},"options":{}}','{"expected_duration_seconds": null, "cost": 0.0, "cost_currency": "USD", "train_tokens_per_step": 89, "train_tokens": 891, "data_tokens": 891, "estimated_start_time": null}','3',NULL,'ft:tiny-mistral:25bf8e1a:20261130:done:26e18070','default');
INSERT INTO "jobs" VALUES('1c9d4d49-8407-4fb2-bfc4-162abe843e75','scripted','tiny-mistral','completion','RUNNING','live',1,'65f67c32db692f6912bd2726d89914369d2f323622854ed85bc225d75c060ff3',1.79603610189873313905e+09,'static',1.79603610213158631321e+09,1.79603610192147254949e+09,1,'[{"file_id": "f0d4b944-e8b5-43c5-831a-cde4c8cf578d", "weight": 1.0}]','[]','["6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4"]','{"training_steps": 10, "learning_rate": 0.0001}','[]',2048,'[]',NULL,NULL,'{"model":"tiny-mistral","method":"sft","tuning":null,"data":{"train":[{"path":"{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4","weight":1.0}],"validation":[]},"hyperparameters":{"learning_rate":0.0001,"epochs":null,"training_steps":10,"batch_size":null,"seq_len":null,"weight_decay":null,"warmup_fraction":null,"fim_ratio":null,"seed":null},"suffix":"live","classifier_targets":[],"integrations":[],"budget":{"max_cost":null,"max_duration":null},"labels":{},"options":{}}','{"expected_duration_seconds": null, "cost": 0.0, "cost_currency": "USD", "train_tokens_per_step": 89, "train_tokens": 891, "data_tokens": 891, "estimated_start_time": null}','2',NULL,NULL,'default');
INSERT INTO "jobs" VALUES('9b9bb55e-8dfd-42c3-8c2b-5b2d03091bdc','scripted','tiny-mistral','completion','VALIDATED','idle',0,'1ed5aba12814d5e180fd39b84e7524155e693e5f458a7d1f9e3ba367304f977e',1.79603610224576663977e+09,'static',1.7960361023098168373e+09,NULL,0,'[{"file_id": "f0d4b944-e8b5-43c5-831a-cde4c8cf578d", "weight": 1.0}]','[]','["6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4"]','{"training_steps": 10, "learning_rate": 0.0001}','[]',2048,'[]',NULL,NULL,'{"model":"tiny-mistral","method":"sft","tuning":null,"data":{"train":[{"path":"{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4","weight":1.0}],"validation":[]},"hyperparameters":{"learning_rate":0.0001,"epochs":null,"training_steps":10,"batch_size":null,"seq_len":null,"weight_decay":null,"warmup_fraction":null,"fim_ratio":null,"seed":null},"suffix":"idle","classifier_targets":[],"integrations":[],"budget":{"max_cost":null,"max_duration":null},"labels":{},"options":{}}','{"expected_duration_seconds": null, "cost": 0.0, "cost_currency": "USD", "train_tokens_per_step": 89, "train_tokens": 891, "data_tokens": 891, "estimated_start_time": null}',NULL,NULL,NULL,'default');
INSERT INTO "jobs" VALUES('145b6fe8-01c6-48b7-9b18-05299a6800c0','scripted','tiny-mistral','completion','VALIDATED','idle2',0,'1e4fc4ceb8e9c9d212f32302f6475348df2faa073e30223345a4296d07164549',1.79603610230240941054e+09,'static',1.7960361023782775402e+09,NULL,0,'[{"file_id": "f0d4b944-e8b5-43c5-831a-cde4c8cf578d", "weight": 1.0}]','[]','["6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4"]','{"training_steps": 10, "learning_rate": 0.0001}','[]',2048,'[]',NULL,NULL,'{"model":"tiny-mistral","method":"sft","tuning":null,"data":{"train":[{"path":"{HOME}/gateway/files/6ebdee27588cdc1089a96c46739801b77e6c5a01ee00f4674bf6800f0ddc50f4","weight":1.0}],"validation":[]},"hyperparameters":{"learning_rate":0.0001,"epochs":null,"training_steps":10,"batch_size":null,"seq_len":null,"weight_decay":null,"warmup_fraction":null,"fim_ratio":null,"seed":null},"suffix":"idle2","classifier_targets":[],"integrations":[],"budget":{"max_cost":null,"max_duration":null},"labels":{},"options":{}}','{"expected_duration_seconds": null, "cost": 0.0, "cost_currency": "USD", "train_tokens_per_step": 89, "train_tokens": 891, "data_tokens": 891, "estimated_start_time": null}',NULL,NULL,NULL,'default');
CREATE TABLE keys (
	id VARCHAR(8) NOT NULL, 
	name VARCHAR NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	revoked_at FLOAT, 
	scope VARCHAR DEFAULT 'write' NOT NULL, 
	expires_at FLOAT, 
	last_used_at FLOAT, 
	project VARCHAR DEFAULT 'default' NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "keys" VALUES('4b8693bd','laptop','6b5d3e69629bccfe072bbbd8a0092565053207b764a30529b846930b676eb67f',1.79603609937790203096e+09,NULL,'write',NULL,NULL,'team-a');
CREATE TABLE models (
	id VARCHAR NOT NULL, 
	job_id VARCHAR(36) NOT NULL, 
	root VARCHAR NOT NULL, 
	model_type VARCHAR NOT NULL, 
	context_length INTEGER NOT NULL, 
	classifier_targets JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	name VARCHAR, 
	description VARCHAR, 
	archived BOOLEAN NOT NULL, 
	deleted_at FLOAT, 
	project VARCHAR DEFAULT 'default' NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "models" VALUES('ft:tiny-mistral:25bf8e1a:20261130:done:26e18070','26e18070-62f8-404b-89ad-91338a292381','tiny-mistral','completion',2048,'[]',1.79603610181888461109e+09,NULL,NULL,0,NULL,'default');
CREATE INDEX ix_files_sha256 ON files (sha256);
CREATE INDEX ix_files_created_at ON files (created_at);
CREATE INDEX ix_jobs_fingerprint ON jobs (fingerprint);
CREATE INDEX ix_jobs_created_at ON jobs (created_at);
CREATE INDEX ix_jobs_status ON jobs (status);
CREATE INDEX ix_events_job_id ON events (job_id);
COMMIT;
PRAGMA user_version=4;
