// node stream.js HOST:PORT PROTOS_PARENT TASK FILE… : prints the answer's events as JSON, one a line.
// PROTOS_PARENT is the folder that holds protos/, the only thing of EchoVLM that this program knows.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, protosParent, task, ...files] = process.argv.slice(2);
const definition = protoLoader.loadSync(resolve(protosParent, "protos/echovlm.proto"), {
  includeDirs: [resolve(protosParent)],
  keepCase: true,
  enums: String,
  longs: String,
  oneofs: true,
});
const { EchoVLM } = grpc.loadPackageDefinition(definition).echovlm.v1;
const client = new EchoVLM(address, grpc.credentials.createInsecure());

const request = {
  task: `TASK_${task.toUpperCase()}`,
  language: "LANGUAGE_ENGLISH",
  images: files.map((file) => ({ content: readFileSync(file) })),
  max_new_tokens: 16,
};
const metadata = new grpc.Metadata();
metadata.set("x-request-id", "from-node");
const call = client.GenerateStream(request, metadata, { deadline: Date.now() + 60_000 });
call.on("metadata", (received) => console.log(JSON.stringify({ metadata: received.getMap() })));
call.on("data", (event) => console.log(JSON.stringify({ [event.event]: event[event.event] })));
call.on("error", (error) => {
  const details = error.metadata?.get("grpc-status-details-bin").length ?? 0;
  console.log(JSON.stringify({ error: { code: grpc.status[error.code], message: error.details, details } }));
  process.exitCode = 1;
});
call.on("end", () => client.close());
