// Package reuse decides when one build may stand in for another: what makes
// two builds equal (Key), which ends of a run may be served again (Status), and
// how requests for a build that is under way wait for it together (Flights).
//
// It knows derivations and contents, and nothing of accounts, connections,
// stores or guests.
//
// # Why equal keys may share
//
// A builder is a function of what it can see. In its guest it sees
//
//   - the derivation: builder, arguments, environment, system, output names and
//     paths, with all placeholders of inputs replaced;
//   - below /nix/store the closure of its inputs: the bytes of each path, and
//     the references and sizes of each path through exportReferencesGraph;
//   - the sandbox: kernel, shell, devices, number of CPUs, time, randomness.
//
// What the server adds to the builder's outputs (references, content addresses,
// checks such as allowedRequisites) it computes from the outputs' bytes, the
// derivation, and the references of the closure. A Key hashes the first two
// whole, so two requests with equal keys ask for the same function of the same
// arguments, and one answer is as good an answer to either as it is to itself.
// It contains nothing that a client claims: NAR hashes and sizes are of bytes
// that arrived for the asking account, and content addresses were recomputed.
// References are claims of whoever uploaded a path, reach builders and checks,
// and are part of the key for that reason.
//
// The third is outside the key on purpose. Builds are expected to give an
// equally good output for another kernel, time or number of CPUs, just as they
// are between two machines of one owner. For failures that is not so: they
// carry a sandbox generation beside the key and are void when it changes.
//
// # What would break it
//
//   - A closure that lacks a path the builder sees, or an input whose record
//     changes between computing the key and running: take both from one view of
//     the store and hold a lease meanwhile.
//   - A field of Derivation that reaches the guest and is not hashed. Add it to
//     NewKey and raise the version.
//   - Session settings or the account's name in the environment of a builder.
//   - The network of fixed-output derivations. Their success is checked against
//     the hash in the derivation, their failure is never reused.
//   - Runs that were starved or disturbed: Status.Reusable.
package reuse
