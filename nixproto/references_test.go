package nixproto

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// randomPaths returns n store paths.
func randomPaths(r *rand.Rand, n int) []StorePath {
	paths := make([]StorePath, n)
	for i := range paths {
		var sum [20]byte
		for j := range sum {
			sum[j] = byte(r.Uint32())
		}
		paths[i] = StorePath(StoreDir + "/" + EncodeNix32(sum[:]) + "-x")
	}
	return paths
}

// slowScan finds paths as plainly as can be.
func slowScan(b []byte, paths []StorePath) []StorePath {
	var found []StorePath
	for _, p := range paths {
		if bytes.Contains(b, []byte(p.HashPart())) {
			found = append(found, p)
		}
	}
	return found
}

// haystack returns bytes that hold some of paths: among zeros, text, parts of
// hash parts, and next to one another.
func haystack(r *rand.Rand, paths []StorePath) []byte {
	var b bytes.Buffer
	for range r.IntN(12) {
		p := paths[r.IntN(len(paths))].HashPart()
		switch r.IntN(7) {
		case 0:
			b.WriteString(p)
		case 1:
			b.WriteString(p[:r.IntN(32)])
		case 2:
			b.WriteString(p[r.IntN(32):])
		case 3:
			b.Write(make([]byte, r.IntN(50)))
		case 4:
			b.WriteString(strings.Repeat("a", r.IntN(50)))
		case 5:
			fmt.Fprintf(&b, "/nix/store/%s-x ", p)
		case 6:
			b.WriteByte(p[0])
			b.WriteString(p)
		}
	}
	return b.Bytes()
}

// writePieces writes b in pieces of random sizes.
func writePieces(r *rand.Rand, w interface{ Write([]byte) (int, error) }, b []byte) error {
	most := 1 + r.IntN(100)
	for len(b) > 0 {
		n := min(len(b), 1+r.IntN(most))
		if m, err := w.Write(slices.Clone(b[:n])); err != nil || m != n {
			return fmt.Errorf("wrote %d of %d: %w", m, n, err)
		}
		b = b[n:]
	}
	return nil
}

func TestScanner(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		paths := randomPaths(r, 1+r.IntN(4))
		b := haystack(r, paths)
		s := NewScanner(paths)
		if err := writePieces(r, s, b); err != nil {
			t.Fatal(err)
		}
		if got, want := s.Found(), slowScan(b, paths); !slices.Equal(got, want) {
			t.Fatalf("in %q found %q, want %q", b, got, want)
		}
	}
}

func TestScannerSameHashPart(t *testing.T) {
	part := strings.Repeat("a", 32)
	paths := []StorePath{StorePath(StoreDir + "/" + part + "-x"), StorePath(StoreDir + "/" + part + "-y")}
	s := NewScanner(paths)
	if got := s.Found(); len(got) > 0 {
		t.Errorf("%q", got)
	}
	s.Write([]byte(part))
	if got := s.Found(); !slices.Equal(got, paths) {
		t.Errorf("%q", got)
	}
	empty := NewScanner(nil)
	if empty.Write([]byte(part)); len(empty.Found()) > 0 {
		t.Error("found one of none")
	}
}

func TestRewriter(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 3000 {
		paths := randomPaths(r, 2+2*r.IntN(3))
		rewrites := map[StorePath]StorePath{}
		var pairs []string
		for i := 0; i < len(paths); i += 2 {
			rewrites[paths[i]] = paths[i+1]
			pairs = append(pairs, paths[i].HashPart(), paths[i+1].HashPart())
		}
		b := haystack(r, paths)
		var got bytes.Buffer
		w := NewRewriter(&got, rewrites)
		if err := writePieces(r, w, b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if want := strings.NewReplacer(pairs...).Replace(string(b)); got.String() != want {
			t.Fatalf("%q\nbecame %q\nwant   %q", b, got.String(), want)
		}
	}
}

func TestRewriterLong(t *testing.T) {
	from := StorePath(StoreDir + "/" + strings.Repeat("a", 32) + "-x")
	to := StorePath(StoreDir + "/" + strings.Repeat("b", 32) + "-x")
	// A run of one character: replacements follow one another from its front.
	b := bytes.Repeat([]byte("a"), 3*rewriterPiece+17)
	var got bytes.Buffer
	w := NewRewriter(&got, map[StorePath]StorePath{from: to})
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	want := strings.Repeat("b", len(b)/32*32) + strings.Repeat("a", len(b)%32)
	if got.String() != want {
		t.Error("a long run is not replaced from its front")
	}
}

func TestSelfHasher(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		paths := randomPaths(r, 3)
		b := haystack(r, paths)
		part := []byte(paths[0].HashPart())
		h := NewSelfHasher(SHA256, paths[0])
		if err := writePieces(r, h, b); err != nil {
			t.Fatal(err)
		}
		sum, legacy := h.Sums()
		zeroed := bytes.ReplaceAll(b, part, make([]byte, 32))
		if sum != SumSHA256(zeroed) {
			t.Fatalf("%q", b)
		}
		for at, rest := 0, b; ; {
			i := bytes.Index(rest, part)
			if i < 0 {
				break
			}
			zeroed = fmt.Appendf(zeroed, "|%d", at+i)
			at, rest = at+i+32, rest[i+32:]
		}
		if legacy != SumSHA256(zeroed) {
			t.Fatalf("%q: legacy", b)
		}
	}
}

func FuzzScanner(f *testing.F) {
	r := rand.New(rand.NewPCG(7, 8))
	paths := randomPaths(r, 3)
	for range 10 {
		f.Add(haystack(r, paths), uint8(r.Uint32()))
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		s := NewScanner(paths)
		var out bytes.Buffer
		w := NewRewriter(&out, map[StorePath]StorePath{paths[0]: paths[1]})
		for rest := b; len(rest) > 0; {
			n := min(len(rest), int(size)+1)
			s.Write(rest[:n])
			w.Write(rest[:n])
			rest = rest[n:]
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if got, want := s.Found(), slowScan(b, paths); !slices.Equal(got, want) {
			t.Errorf("found %q, want %q", got, want)
		}
		want := bytes.ReplaceAll(b, []byte(paths[0].HashPart()), []byte(paths[1].HashPart()))
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("rewritten to %q, want %q", out.Bytes(), want)
		}
	})
}

func BenchmarkScanner(b *testing.B) {
	r := rand.New(rand.NewPCG(9, 10))
	binary := make([]byte, 16<<20)
	for i := range binary {
		binary[i] = byte(r.Uint32())
	}
	digits := []byte(hex.EncodeToString(binary[:8<<20]))
	text := bytes.Repeat([]byte("The quick brown fox jumps over /nix/store/00000000000000000000000000000000-lazy dogs.\n"), 16<<20/86)
	for _, n := range []int{10, 3000, 300000} {
		paths := randomPaths(r, n)
		for _, data := range []struct {
			name string
			b    []byte
		}{{"binary", binary}, {"zeros", make([]byte, 16<<20)}, {"text", text}, {"hex", digits}} {
			b.Run(fmt.Sprintf("%s/%d", data.name, n), func(b *testing.B) {
				s := NewScanner(paths)
				b.SetBytes(int64(len(data.b)))
				for b.Loop() {
					for rest := data.b; len(rest) > 0; {
						n := min(len(rest), 256<<10)
						s.Write(rest[:n])
						rest = rest[n:]
					}
				}
			})
		}
	}
}

func BenchmarkRewriter(b *testing.B) {
	r := rand.New(rand.NewPCG(11, 12))
	data := make([]byte, 16<<20)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	paths := randomPaths(r, 2)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		w := NewRewriter(nullWriter{}, map[StorePath]StorePath{paths[0]: paths[1]})
		w.Write(data)
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

type nullWriter struct{}

func (nullWriter) Write(b []byte) (int, error) { return len(b), nil }
