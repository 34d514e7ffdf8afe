package nixproto

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
)

// A ClosureHash names the contents of a store path together with that of all
// paths it refers to, directly or not: a Merkle hash over the graph of
// references.
type ClosureHash [sha256.Size]byte

// closureTag separates closure hashes from other hashes. Stores keep closure
// hashes with their paths: who changes what is hashed raises the number here,
// and the version of the records that hold them.
const closureTag = "nbd closure 1"

// HashClosure returns the closure hash of a path: of its own path, NAR hash and
// size, references and content address, and the closure hashes of the paths it
// refers to, which refs returns. A reference to itself is noted without asking
// refs. The order of p.References does not matter.
func (p *PathInfo) HashClosure(refs func(StorePath) (ClosureHash, bool)) (ClosureHash, error) {
	b := make([]byte, 0, 512)
	num := func(n uint64) { b = binary.LittleEndian.AppendUint64(b, n) }
	str := func(s string) {
		num(uint64(len(s)))
		b = append(b, s...)
	}
	str(closureTag)
	str(string(p.Path))
	str(p.NarHash.String())
	num(p.NarSize)
	str(p.CA)
	sorted := p.sortedReferences()
	num(uint64(len(sorted)))
	for _, r := range sorted {
		str(string(r))
		if r == p.Path {
			continue
		}
		h, ok := refs(r)
		if !ok {
			return ClosureHash{}, fmt.Errorf("hash closure of %s: no hash of its reference %s", p.Path, r)
		}
		b = append(b, h[:]...)
	}
	return sha256.Sum256(b), nil
}

// sortedReferences returns the references in order and each once; that is how
// most come.
func (p *PathInfo) sortedReferences() []StorePath {
	for i, r := range p.References {
		if i > 0 && r <= p.References[i-1] {
			return slices.Compact(slices.Sorted(slices.Values(p.References)))
		}
	}
	return p.References
}
