package reuse

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"maps"
	"slices"

	"nbd/nixproto"
)

// The tags that separate the hashes of this package from one another and from
// those of other versions. Raise the number with any change of what is hashed:
// it makes all stored results unreachable.
const (
	keyTag     = "nbd build key 1"
	closureTag = "nbd closure 1"
)

// A Key names a build by everything that its builder sees.
type Key [sha256.Size]byte

// String returns the key in hexadecimal.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// ParseKey reads what String wrote.
func ParseKey(s string) (Key, error) {
	var k Key
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(k) {
		return k, fmt.Errorf("parse build key: want %d hexadecimal digits", 2*len(k))
	}
	copy(k[:], b)
	return k, nil
}

// A ClosureHash names the contents of a store path together with that of all
// paths it refers to, directly or not: a Merkle hash over the graph of
// references.
type ClosureHash [sha256.Size]byte

// HashPath returns the closure hash of a path: of its own record and the
// closure hashes of the paths it refers to, which refs returns. A reference to
// itself is noted without asking refs. The order of info.References does not
// matter.
func HashPath(info *nixproto.PathInfo, refs func(nixproto.StorePath) (ClosureHash, bool)) (ClosureHash, error) {
	h := newHasher(closureTag)
	h.str(string(info.Path))
	h.str(info.NarHash.String())
	h.num(info.NarSize)
	h.str(info.CA)
	sorted := slices.Compact(slices.Sorted(slices.Values(info.References)))
	h.num(uint64(len(sorted)))
	for _, r := range sorted {
		h.str(string(r))
		if r == info.Path {
			continue
		}
		sum, ok := refs(r)
		if !ok {
			return ClosureHash{}, fmt.Errorf("hash closure of %s: no hash of its reference %s", info.Path, r)
		}
		h.raw(sum[:])
	}
	return ClosureHash(h.sum()), nil
}

// NewKey returns the key of building drv, which must be resolved (no
// InputDrvs), with the given closure of its inputs: the paths of drv.InputSrcs
// and all they refer to, each once, in any order.
//
// drv.InputSrcs itself is no part of the key. A builder sees the closure and
// cannot tell which of its members were named; a client that sends one
// derivation names all of them where a .drv file names the direct inputs, and
// both are the same build.
func NewKey(drv *nixproto.Derivation, closure []*nixproto.PathInfo) (Key, error) {
	if len(drv.InputDrvs) > 0 {
		return Key{}, fmt.Errorf("key of %s: inputs are not resolved", drv.Name)
	}
	roots, err := closureRoots(closure)
	if err != nil {
		return Key{}, fmt.Errorf("key of %s: %w", drv.Name, err)
	}
	h := newHasher(keyTag)
	h.str(drv.Name)
	hashDerivation(h, drv)
	h.num(uint64(len(roots)))
	for _, r := range roots {
		h.raw(r[:])
	}
	return Key(h.sum()), nil
}

// hashDerivation feeds everything of drv but its name and inputs.
func hashDerivation(h hasher, drv *nixproto.Derivation) {
	h.num(uint64(len(drv.Outputs)))
	for _, name := range slices.Sorted(maps.Keys(drv.Outputs)) {
		out := drv.Outputs[name]
		h.str(name)
		h.str(string(out.Path))
		h.str(out.HashAlgo)
		h.str(out.Hash)
	}
	h.str(drv.System)
	h.str(drv.Builder)
	h.num(uint64(len(drv.Args)))
	for _, a := range drv.Args {
		h.str(a)
	}
	h.num(uint64(len(drv.Env)))
	for _, name := range slices.Sorted(maps.Keys(drv.Env)) {
		h.str(name)
		h.str(drv.Env[name])
	}
}

// closureRoots returns the closure hashes of the paths that no other path of
// the closure refers to, ordered by path. Together they stand for the whole
// closure, and they are the same whichever members were named as inputs.
func closureRoots(closure []*nixproto.PathInfo) ([]ClosureHash, error) {
	sums, err := HashClosure(closure)
	if err != nil {
		return nil, err
	}
	referred := make(map[nixproto.StorePath]bool, len(closure))
	for _, info := range closure {
		for _, r := range info.References {
			if r != info.Path {
				referred[r] = true
			}
		}
	}
	var paths []nixproto.StorePath
	for p := range sums {
		if !referred[p] {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	roots := make([]ClosureHash, len(paths))
	for i, p := range paths {
		roots[i] = sums[p]
	}
	return roots, nil
}

// HashClosure returns the closure hash of every path of a closure, given in any
// order. It is an error if a reference is not a member, if a path occurs twice,
// or if references go round in a circle.
func HashClosure(closure []*nixproto.PathInfo) (map[nixproto.StorePath]ClosureHash, error) {
	infos := make(map[nixproto.StorePath]*nixproto.PathInfo, len(closure))
	users := make(map[nixproto.StorePath][]nixproto.StorePath)
	waits := make(map[nixproto.StorePath]int, len(closure)) // references not hashed yet
	for _, info := range closure {
		if infos[info.Path] != nil {
			return nil, fmt.Errorf("hash closure: %s occurs twice", info.Path)
		}
		infos[info.Path] = info
		for _, r := range slices.Compact(slices.Sorted(slices.Values(info.References))) {
			if r != info.Path {
				users[r] = append(users[r], info.Path)
				waits[info.Path]++
			}
		}
	}
	var ready []nixproto.StorePath
	for p := range infos {
		if waits[p] == 0 {
			ready = append(ready, p)
		}
	}
	sums := make(map[nixproto.StorePath]ClosureHash, len(infos))
	lookup := func(p nixproto.StorePath) (ClosureHash, bool) { s, ok := sums[p]; return s, ok }
	for len(ready) > 0 {
		p := ready[len(ready)-1]
		ready = ready[:len(ready)-1]
		sum, err := HashPath(infos[p], lookup)
		if err != nil {
			return nil, err
		}
		sums[p] = sum
		for _, u := range users[p] {
			if waits[u]--; waits[u] == 0 {
				ready = append(ready, u)
			}
		}
	}
	if len(sums) != len(infos) {
		return nil, fmt.Errorf("hash closure: %s", incomplete(infos, sums))
	}
	return sums, nil
}

// incomplete says why not all paths of a closure could be hashed.
func incomplete(infos map[nixproto.StorePath]*nixproto.PathInfo, sums map[nixproto.StorePath]ClosureHash) string {
	for p, info := range infos {
		if _, done := sums[p]; done {
			continue
		}
		for _, r := range info.References {
			if infos[r] == nil {
				return fmt.Sprintf("%s refers to %s, which is not in the closure", p, r)
			}
		}
	}
	return "references go round in a circle"
}

// A hasher feeds SHA-256 with fields that cannot run into one another: numbers
// are eight bytes, strings carry their length.
type hasher struct{ h hash.Hash }

func newHasher(tag string) hasher {
	h := hasher{sha256.New()}
	h.str(tag)
	return h
}

func (h hasher) num(n uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	h.h.Write(b[:])
}

func (h hasher) str(s string) {
	h.num(uint64(len(s)))
	h.h.Write([]byte(s))
}

func (h hasher) raw(b []byte) { h.h.Write(b) }

func (h hasher) sum() (sum [sha256.Size]byte) {
	h.h.Sum(sum[:0])
	return sum
}
