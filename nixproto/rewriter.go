package nixproto

import (
	"hash"
	"io"
	"strconv"
)

// A Rewriter passes a stream on with hash parts replaced by others, which keeps
// every length. It is an io.Writer to be closed; hash parts may straddle writes.
// It is used by one goroutine at a time.
type Rewriter struct {
	w        io.Writer
	rewrites map[hashPart]hashPart
	filter   partFilter
	buf      []byte // what may still be the beginning of a hash part
	offset   int64  // of buf in the stream
	matched  func(offset int64)
	err      error
}

// NewRewriter returns a Rewriter to w that replaces the hash part of each path
// that is a key of rewrites by the one of its value.
func NewRewriter(w io.Writer, rewrites map[StorePath]StorePath) *Rewriter {
	parts := make(map[hashPart]hashPart, len(rewrites))
	for from, to := range rewrites {
		parts[hashPart([]byte(from.HashPart()))] = hashPart([]byte(to.HashPart()))
	}
	return newRewriter(w, parts)
}

func newRewriter(w io.Writer, rewrites map[hashPart]hashPart) *Rewriter {
	r := &Rewriter{w: w, rewrites: rewrites, filter: newPartFilter(len(rewrites))}
	for from := range rewrites {
		r.filter.add(from[:])
	}
	return r
}

// rewriterPiece bounds how much of a write is copied at a time.
const rewriterPiece = 256 << 10

// Write passes b on, but for the end that the next write may change.
func (r *Rewriter) Write(b []byte) (int, error) {
	n := 0
	for len(b) > 0 && r.err == nil {
		piece := b[:min(len(b), rewriterPiece)]
		b = b[len(piece):]
		r.buf = append(r.buf, piece...)
		keep := min(len(r.buf), HashPartLen-1)
		r.pass(len(r.buf) - keep)
		n += len(piece)
	}
	return n, r.err
}

// Close passes on what is left. It does not close the underlying writer.
func (r *Rewriter) Close() error {
	r.pass(len(r.buf))
	return r.err
}

// pass rewrites buf and passes on n bytes, and the rest of a hash part that
// begins in them.
func (r *Rewriter) pass(n int) {
	if r.err != nil {
		return
	}
	free := 0 // up to here buf was replaced
	forEachHashPart(r.buf, &r.filter, func(at int) {
		to, ok := r.rewrites[hashPart(r.buf[at:])]
		if !ok || at < free {
			return
		}
		copy(r.buf[at:], to[:])
		free = at + HashPartLen
		if r.matched != nil {
			r.matched(r.offset + int64(at))
		}
	})
	n = max(n, free)
	if n > 0 {
		_, r.err = r.w.Write(r.buf[:n])
	}
	r.offset += int64(n)
	r.buf = r.buf[:copy(r.buf, r.buf[n:])]
}

// A SelfHasher computes the hash of an archive that may refer to its own path,
// modulo these references: with 32 zeros for each hash part of the path. It is
// an io.Writer that never fails. It is used by one goroutine at a time.
type SelfHasher struct {
	algo    HashAlgo
	hash    hash.Hash
	rewrite *Rewriter
	offsets []int64
	many    bool // more than maxSelfOffsets
}

// maxSelfOffsets bounds how many offsets are kept for LegacySum.
const maxSelfOffsets = 1 << 20

// NewSelfHasher returns a SelfHasher for the object at path, with algorithm a.
func NewSelfHasher(a HashAlgo, path StorePath) *SelfHasher {
	s := &SelfHasher{algo: a, hash: NewHasher(a)}
	s.rewrite = newRewriter(s.hash, map[hashPart]hashPart{hashPart([]byte(path.HashPart())): {}})
	s.rewrite.matched = func(offset int64) {
		if s.many = s.many || len(s.offsets) == maxSelfOffsets; !s.many {
			s.offsets = append(s.offsets, offset)
		}
	}
	return s
}

// Write adds b to the archive.
func (s *SelfHasher) Write(b []byte) (int, error) { return s.rewrite.Write(b) }

// Sums ends the archive. It returns the hash as new releases of Nix compute it
// (seen in 2.26 and 2.34), and as old ones did (seen in 2.8), with the offset of
// each reference, "|<decimal>", after the archive. The latter is zero if the
// references are more than a million.
func (s *SelfHasher) Sums() (sum, legacy Hash) {
	s.rewrite.Close() // to a hash, which does not fail
	sum = HashFromSum(s.algo, s.hash)
	if s.many {
		return sum, Hash{}
	}
	var buf []byte
	for _, offset := range s.offsets {
		buf = strconv.AppendInt(append(buf[:0], '|'), offset, 10)
		s.hash.Write(buf)
	}
	return sum, HashFromSum(s.algo, s.hash)
}
