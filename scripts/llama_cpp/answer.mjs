// Answers requests about a GGUF file with llama.cpp on the CPU.
//
// Reads {"model": FILE, "threads": N, "requests": [...]} from standard input and writes a JSON list of answers. A request is one of
//   {"kind": "tokenize", "texts": [TEXT, ...]}            -> a list of token ids for each text, with special tokens read as such
//   {"kind": "probabilities", "tokens": [ID, ...]}        -> after each token, the probabilities of the next one, by id
//   {"kind": "likelihood", "tokens": [ID, ...]}           -> the log-probability of each token after the first
//   {"kind": "greedy", "tokens": [ID, ...], "count": N}   -> {"tokens": the most likely N next tokens, "seconds"}
import { readFileSync } from "node:fs";
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const { model: modelPath, threads = 2, requests } = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads });
const model = await llama.loadModel({ modelPath });

async function fresh(length) {
    const context = await model.createContext({ contextSize: Math.max(length + 8, 64), threads, batchSize: 512 });
    return { context, sequence: context.getSequence() };
}

const answers = {
    tokenize: async ({ texts }) => texts.map((text) => [...model.tokenize(text, true)]),
    probabilities: async ({ tokens }) => {
        const { context, sequence } = await fresh(tokens.length);
        const asked = tokens.map((token) => [token, { generateNext: { probabilities: true } }]);
        const found = await sequence.controlledEvaluate(asked);
        await context.dispose();
        return found.map(({ next }) => {
            const row = new Array(next.probabilities.size).fill(0);
            for (const [token, probability] of next.probabilities) row[token] = probability;
            return row;
        });
    },
    likelihood: async ({ tokens }) => {
        const { context, sequence } = await fresh(tokens.length);
        const options = (target) => ({
            // includeTop, as includeMax leaves the largest out
            generateNext: { logits: { filter: { tokens: [target], includeTop: 1 } }, totalLogitWeight: true },
        });
        const asked = tokens.slice(0, -1).map((token, i) => [token, options(tokens[i + 1])]);
        const found = await sequence.controlledEvaluate(asked);
        await context.dispose();
        return found.map(({ next }, i) => {
            const top = Math.max(...next.logits.values());
            return next.logits.get(tokens[i + 1]) - top - Math.log(next.totalLogitWeight);
        });
    },
    greedy: async ({ tokens, count }) => {
        const { context, sequence } = await fresh(tokens.length + count);
        const start = performance.now();
        const written = [];
        for await (const token of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
            written.push(token);
            if (written.length === count) break;
        }
        const seconds = (performance.now() - start) / 1000;
        await context.dispose();
        return { tokens: written, seconds };
    },
};

const results = [];
for (const request of requests) results.push(await answers[request.kind](request));
process.stdout.write(JSON.stringify(results), () => process.exit(0)); // exit once all is written
