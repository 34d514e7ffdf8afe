package nixproto

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// exportAll lets cmp look into values such as Hash.
var exportAll = cmp.Exporter(func(reflect.Type) bool { return true })

var workerVersions = []Version{0x120, 0x121, 0x122, 0x123, 0x124, 0x125, 0x126}

// encoded returns what f writes.
func encoded(t testing.TB, f func(*Writer) error) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	if err := errors.Join(f(w), w.Flush()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// roundTrip writes a value, reads it back, and does so with a stream that comes
// byte by byte and with all streams that end too early.
func roundTrip[T any](t *testing.T, want T, write func(*Writer) error, read func(*Reader) (T, error)) {
	t.Helper()
	b := encoded(t, write)
	for name, src := range map[string]io.Reader{
		"whole": bytes.NewReader(b), "single bytes": oneByte{bytes.NewReader(b)},
	} {
		r := NewReader(src)
		got, err := read(r)
		if err != nil {
			t.Errorf("%T, %s: %v", want, name, err)
		}
		if d := cmp.Diff(want, got, exportAll); d != "" {
			t.Errorf("%T, %s (-want +got):\n%s", want, name, d)
		}
		if err := r.Await(); err != io.EOF {
			t.Errorf("%T, %s: %v behind it, want EOF", want, name, err)
		}
	}
	for n := 0; n < len(b); n += 1 + n/100 {
		_, err := read(NewReader(bytes.NewReader(b[:n])))
		if !errors.Is(err, io.ErrUnexpectedEOF) && !(n == 0 && err == io.EOF) {
			t.Errorf("%T cut at %d: %v", want, n, err)
		}
	}
}

// oneByte reads one byte at a time.
type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

func TestRequests(t *testing.T) {
	for _, v := range workerVersions {
		for _, req := range sampleRequests() {
			roundTrip(t, req,
				func(w *Writer) error { return WriteRequest(w, v, req) },
				func(r *Reader) (Request, error) { return ReadRequest(r, v) })
			for _, resp := range sampleResponses(v, req) {
				roundTrip(t, resp,
					func(w *Writer) error { return WriteResponse(w, v, resp) },
					func(r *Reader) (Response, error) { return ReadResponse(r, v, req) })
			}
		}
	}
}

// TestAllOps sees to it that the samples, the names and newRequest know the same
// operations.
func TestAllOps(t *testing.T) {
	seen := map[Op]bool{}
	for _, req := range sampleRequests() {
		seen[req.Op()] = true
		made := newRequest(req.Op())
		if reflect.TypeOf(made) != reflect.TypeOf(req) {
			t.Errorf("%v is read as %T, want %T", req.Op(), made, req)
		}
		if name := reflect.TypeOf(req).Elem().Name(); name != req.Op().String() {
			t.Errorf("%s is called %v", name, req.Op())
		}
	}
	if len(seen) != len(opNames) {
		t.Errorf("%d samples for %d operations", len(seen), len(opNames))
	}
}

func TestUnknownOp(t *testing.T) {
	for _, n := range []uint64{0, 2, 3, 8, 21, 28, 48, 50, 1000, 1 << 63} {
		b := encoded(t, func(w *Writer) error { w.Uint64(n); return nil })
		_, err := ReadRequest(NewReader(bytes.NewReader(b)), MaxWorker)
		unknown, ok := errors.AsType[*UnknownOpError](err)
		if !ok || unknown.Number != n || !strings.Contains(err.Error(), fmt.Sprint(n)) {
			t.Errorf("operation %d: %v", n, err)
		}
	}
}

// TestRefusedValues reads requests with one bad value; the reader has to stand
// behind them.
func TestRefusedValues(t *testing.T) {
	tests := map[string]struct {
		op    Op
		write func(*Writer)
		want  string
	}{
		"other store": {OpQueryPathInfo, func(w *Writer) { w.Str("/gnu/store/x") }, "/nix/store"},
		"no path":     {OpQueryPathInfo, func(w *Writer) { w.Str("") }, "store path"},
		"second path": {OpQueryValidPaths, func(w *Writer) {
			w.Strings([]string{string(pathA), "x", string(pathB)})
			w.Bool(true)
		}, `"x"`},
		"long path": {OpIsValidPath, func(w *Writer) { w.Str(string(pathA) + strings.Repeat("x", 300)) }, "211"},
		"build mode": {OpBuildPaths, func(w *Writer) {
			w.Strings([]string{string(pathA)})
			w.Uint64(3)
		}, "mode 3"},
		"dynamic derivation": {OpQueryMissing, func(w *Writer) { w.Strings([]string{string(pathD) + "!a!b"}) }, "dynamic"},
		"hash":               {OpAddToStoreNar, addNarWithHash("abc"), "hash"},
		"short hash":         {OpAddToStoreNar, addNarWithHash("sha1:" + strings.Repeat("0", 40)), "hash"},
		"log of a path":      {OpAddBuildLog, func(w *Writer) { w.Path(pathD) }, "hash part"},
		"hash part":          {OpQueryPathFromHashPart, func(w *Writer) { w.Str("e") }, "hash part"},
		"realisation":        {OpRegisterDrvOutput, func(w *Writer) { w.Str("{}") }, "realisation"},
		"realisation id":     {OpQueryRealisation, func(w *Writer) { w.Str("!") }, "realisation id"},
		"name": {OpAddToStore, func(w *Writer) {
			w.Str("a/b")
			w.Str("text:sha256")
			w.Strings(nil)
			w.Bool(false)
		}, "a/b"},
		"option twice": {OpSetOptions, func(w *Writer) {
			writeAll(w, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
			w.Uint64(2)
			for range 4 {
				w.Str("a")
			}
		}, "twice"},
		"not a derivation": {OpBuildDerivation, func(w *Writer) {
			w.Path(pathA)
			sampleDrv.basicFields(codec{w: w})
			w.Uint64(0)
		}, "derivation"},
		"output twice": {OpBuildDerivation, func(w *Writer) {
			w.Path(pathD)
			w.Uint64(2)
			for range 2 {
				w.Str("out")
				writeAll(w, 0, 0, 0)
			}
			writeAll(w, 0, 0, 0, 0, 0, 0)
		}, "output \"out\" comes twice"},
		"output name": {OpBuildDerivation, func(w *Writer) {
			w.Path(pathD)
			w.Uint64(1)
			w.Str("a/b")
			writeAll(w, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		}, "a/b"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			b := encoded(t, func(w *Writer) error {
				w.Uint64(uint64(test.op))
				test.write(w)
				return WriteRequest(w, MaxWorker, &IsValidPath{pathA})
			})
			r := NewReader(bytes.NewReader(b))
			_, err := ReadRequest(r, MaxWorker)
			if _, ok := errors.AsType[*ValueError](err); !ok || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want a ValueError with %q", err, test.want)
			}
			req, err := ReadRequest(r, MaxWorker)
			if d := cmp.Diff(Request(&IsValidPath{pathA}), req); err != nil || d != "" {
				t.Errorf("next request: %v\n%s", err, d)
			}
		})
	}
}

func addNarWithHash(hash string) func(*Writer) {
	return func(w *Writer) {
		w.Path(pathA)
		w.Path("")
		w.Str(hash)
		for range 8 {
			w.Uint64(0)
		}
	}
}

// TestSpellings reads the hash of a path in each of its spellings.
func TestSpellings(t *testing.T) {
	for _, s := range []string{hashA.Base16(), hashA.Base32(), hashA.Base64(), hashA.SRI(), hashA.String(),
		"sha256:" + hashA.Base16()} {
		b := encoded(t, func(w *Writer) error { w.Uint64(39); addNarWithHash(s)(w); return nil })
		req, err := ReadRequest(NewReader(bytes.NewReader(b)), MaxWorker)
		if err != nil || req.(*AddToStoreNar).Info.NarHash != hashA {
			t.Errorf("%s: %v", s, err)
		}
	}
}

// TestSets writes sets out of order and with duplicates, and reads such.
func TestSets(t *testing.T) {
	want := []StorePath{pathA, pathB}
	messy := []StorePath{pathB, pathA, pathB}
	sorted := encoded(t, func(w *Writer) error { w.Paths(want); return nil })
	written := encoded(t, func(w *Writer) error { return WriteResponse(w, MaxWorker, new(PathSet(messy))) })
	if !bytes.Equal(written, sorted) {
		t.Errorf("wrote %q", written)
	}
	if messy[0] != pathB {
		t.Error("writing changed the caller's slice")
	}
	raw := encoded(t, func(w *Writer) error { w.Paths(messy); return nil })
	if got := NewReader(bytes.NewReader(raw)).Paths(); !reflect.DeepEqual(got, want) {
		t.Errorf("read %q", got)
	}
}

func TestBuildResultKeys(t *testing.T) {
	other := sampleReal
	other.OutputName = "dev"
	b := encoded(t, func(w *Writer) error {
		for range 6 {
			w.Uint64(0)
		}
		w.Uint64(1)
		w.Str(other.ID())
		w.Bytes(sampleReal.JSON())
		return nil
	})
	_, err := ReadResponse(NewReader(bytes.NewReader(b)), MinWorker, &BuildDerivation{})
	if _, ok := errors.AsType[*ValueError](err); !ok {
		t.Errorf("realisation under another key: %v", err)
	}
}
