// Package nixproto turns the bytes of Nix's protocols and file formats into
// values and back: the worker protocol 1.32 to 1.38, the serve protocol 2.5 to
// 2.7, store paths, hashes, derivations, NAR archives (package nar), path
// information with its signatures, and realisations.
//
// It starts no goroutine, opens no file and imports no other package of nbd.
// Every decoder reads hostile bytes: lengths are bounded before anything is
// allocated, and nothing recurses on the depth of its input.
package nixproto
