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
// That also answers why those who share need not trust each other. An output
// that comes by an equal key is what the asking account's own run could have
// made, of bytes that this account brought or was lent; no claim of whoever ran
// it enters, only what its builder wrote in a guest that it does not control
// from outside. What an account could do to poison a key is what every builder
// can do anyway: be a derivation with those inputs whose outputs differ from run
// to run. The name, the signatures and the page of the account that ran it stay
// its own; whoever is answered signs for itself.
//
// The third is outside the key on purpose. Builds are expected to give an
// equally good output for another kernel, time or number of CPUs, just as they
// are between two machines of one owner. For failures that is not so: they
// carry a sandbox generation beside the key and are void when it changes.
//
// The same holds while a run is under way: a Flight is one run under a key, and
// whoever asks for an equal key waits for it, in its Scope: that of everybody
// who shares, or one account's. A success counts for all who wait, and so does a
// permanent failure, of this sandbox as it is; an end of ours counts for nobody.
// Limits are not in the key: who waits is judged by its own.
//
// # What would break it
//
//   - A closure that lacks a path the builder sees, or an input whose record
//     changes between computing the key and running: take both from one view of
//     the store and hold a lease meanwhile. The server takes them one after the
//     other, and compares the key with that of what it is about to run.
//   - A field of Derivation that reaches the guest and is not hashed. Add it to
//     NewKey and raise the version.
//   - Session settings or the account's name in the environment of a builder.
//   - The network of fixed-output derivations. Their success is checked against
//     the hash in the derivation, their failure is never reused.
//   - A failure of a guest with less memory than the one who asks would have: not
//     every builder that lacks some is killed for it. It carries what it had.
//   - Runs that were starved or disturbed, or that a limit ended: only Permanent
//     ends are truths about a build. A processor that is emulated may kill a
//     builder that a real one would not (signals of such an end are not reused).
//   - A result whose bytes are not those that were stored: bytes are named by
//     their hash, held while they are granted, and do not count once they are
//     gone.
package reuse
