package nixproto

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"slices"
	"testing"

	"nbd/nixproto/nar"
)

// All targets check the same: no input makes a decoder panic, and what decodes
// is encoded to bytes that decode to an equal value. Their seeds are pieces of
// the recordings and the samples of the other tests.

// seeds calls add with a piece of each kind, version and operation that the
// recordings have.
func seeds(f *testing.F, kind string, add func(piece)) {
	f.Helper()
	type key struct {
		v  Version
		op uint64
	}
	seen := map[key]bool{}
	for _, rec := range recordings(f) {
		s := newSession(f, rec, func(p piece) {
			if k := (key{p.v, p.op}); p.kind == kind && !seen[k] {
				seen[k] = true
				add(p)
			}
		})
		if err := s.run(); err != nil && !errors.Is(err, errCut) {
			f.Fatal(err)
		}
	}
	if len(seen) == 0 {
		f.Fatalf("no recording has a %s", kind)
	}
}

// anyVersion picks a version by a number of the fuzzer.
func anyVersion(list []Version, n uint8) Version { return list[int(n)%len(list)] }

// refuzz decodes data; what decodes has to survive encoding.
func refuzz[T any](t *testing.T, data []byte, read func(*Reader) (T, error), write func(*Writer, T) error) {
	r := NewReader(bytes.NewReader(data))
	first, err := read(r)
	if err != nil {
		return
	}
	b := encoded(t, func(w *Writer) error { return write(w, first) })
	r = NewReader(bytes.NewReader(b))
	second, err := read(r)
	if err != nil {
		t.Fatalf("%+v is written as %q, which is not read: %v", first, b, err)
	}
	if err := r.Await(); err != io.EOF {
		t.Fatalf("bytes behind %+v: %v", second, err)
	}
	if !reflect.DeepEqual(first, second) {
		t.Fatalf("read %+v, then %+v", first, second)
	}
}

func FuzzRequest(f *testing.F) {
	seeds(f, "request", func(p piece) { f.Add(uint8(p.v-MinWorker), p.bytes) })
	for _, req := range sampleRequests() {
		f.Add(uint8(0), encoded(f, func(w *Writer) error { return WriteRequest(w, MinWorker, req) }))
	}
	f.Fuzz(func(t *testing.T, n uint8, data []byte) {
		v := anyVersion(workerVersions, n)
		refuzz(t, data, func(r *Reader) (Request, error) { return ReadRequest(r, v) },
			func(w *Writer, req Request) error { return WriteRequest(w, v, req) })
	})
}

func FuzzResponse(f *testing.F) {
	seeds(f, "response", func(p piece) { f.Add(uint8(p.v-MinWorker), uint8(p.op), p.bytes) })
	for _, req := range sampleRequests() {
		for _, resp := range sampleResponses(MaxWorker, req) {
			b := encoded(f, func(w *Writer) error { return WriteResponse(w, MaxWorker, resp) })
			f.Add(uint8(MaxWorker-MinWorker), uint8(req.Op()), b)
		}
	}
	f.Fuzz(func(t *testing.T, n, op uint8, data []byte) {
		v := anyVersion(workerVersions, n)
		req := newRequest(Op(op))
		if req == nil {
			return
		}
		refuzz(t, data, func(r *Reader) (Response, error) { return ReadResponse(r, v, req) },
			func(w *Writer, resp Response) error { return WriteResponse(w, v, resp) })
	})
}

func FuzzLog(f *testing.F) {
	seeds(f, "log", func(p piece) { f.Add(uint8(p.v-MinWorker), p.bytes) })
	for _, m := range sampleLogs() {
		f.Add(uint8(0), encoded(f, func(w *Writer) error { return WriteLog(w, MinWorker, m) }))
	}
	f.Fuzz(func(t *testing.T, n uint8, data []byte) {
		v := anyVersion(workerVersions, n)
		refuzz(t, data, func(r *Reader) (LogMessage, error) { return ReadLog(r, v) },
			func(w *Writer, m LogMessage) error { return WriteLog(w, v, m) })
	})
}

func FuzzServeRequest(f *testing.F) {
	seeds(f, "serve request", func(p piece) { f.Add(uint8(p.v-MinServe), p.bytes) })
	for i, v := range serveVersions {
		for _, req := range sampleServeRequests(v) {
			f.Add(uint8(i), encoded(f, func(w *Writer) error { return WriteServeRequest(w, v, req) }))
		}
	}
	f.Fuzz(func(t *testing.T, n uint8, data []byte) {
		v := anyVersion(serveVersions, n)
		refuzz(t, data, func(r *Reader) (ServeRequest, error) { return ReadServeRequest(r, v) },
			func(w *Writer, req ServeRequest) error { return WriteServeRequest(w, v, req) })
	})
}

func FuzzServeResponse(f *testing.F) {
	seeds(f, "serve response", func(p piece) { f.Add(uint8(p.v-MinServe), uint8(p.op), p.bytes) })
	for i, v := range serveVersions {
		for _, req := range sampleServeRequests(v) {
			for _, resp := range sampleServeResponses(v, req) {
				b := encoded(f, func(w *Writer) error { return WriteResponse(w, v, resp) })
				f.Add(uint8(i), uint8(req.Command()), b)
			}
		}
	}
	f.Fuzz(func(t *testing.T, n, command uint8, data []byte) {
		v := anyVersion(serveVersions, n)
		req := newServeRequest(ServeCommand(command))
		if req == nil {
			return
		}
		refuzz(t, data, func(r *Reader) (Response, error) { return ReadServeResponse(r, v, req) },
			func(w *Writer, resp Response) error { return WriteResponse(w, v, resp) })
	})
}

// FuzzFramed reads a framed stream as an upload of several paths, whose bytes
// have to come out again, and as raw bytes.
func FuzzFramed(f *testing.F) {
	seeds(f, "framed", func(p piece) { f.Add(p.bytes) })
	f.Fuzz(func(t *testing.T, data []byte) {
		raw := NewFramedReader(NewReader(bytes.NewReader(data)))
		payload, rawErr := io.ReadAll(raw)
		if rawErr == nil {
			rawErr = raw.Finish()
		}

		r := NewReader(oneByte{bytes.NewReader(data)})
		framed := NewFramedReader(r)
		type upload struct {
			infos []PathInfo
			nars  []byte
		}
		var up upload
		_, err := readUpload(&framed.Reader, &up.infos, &up.nars)
		finish := framed.Finish()
		if (rawErr == nil) != (r.Err() == nil) {
			t.Fatalf("connection is %v as bytes and %v as an upload", rawErr, r.Err())
		}
		if err != nil || finish != nil {
			return
		}
		refuzz(t, payload, func(r *Reader) (u upload, err error) {
			_, err = readUpload(r, &u.infos, &u.nars)
			return u, err
		}, func(w *Writer, u upload) error {
			w.Uint64(uint64(len(u.infos)))
			archives := u.nars
			for i := range u.infos {
				if err := WritePathInfo(w, &u.infos[i]); err != nil {
					return err
				}
				n := narLen(archives)
				if _, err := w.Write(archives[:n]); err != nil {
					return err
				}
				archives = archives[n:]
			}
			return nil
		})
	})
}

// readUpload reads the payload of AddMultipleToStore.
func readUpload(r *Reader, infos *[]PathInfo, archives *[]byte) (n uint64, err error) {
	n = r.Uint64()
	for range n {
		info, err := ReadPathInfo(r)
		if err != nil {
			return n, err
		}
		var archive bytes.Buffer
		w := NewWriter(&archive)
		if err := errors.Join(copyNar(r, w), w.Flush()); err != nil {
			return n, err
		}
		*infos = append(*infos, *info)
		*archives = append(*archives, archive.Bytes()...)
	}
	return n, r.Err()
}

// narLen returns the length of the archive that b begins with.
func narLen(b []byte) int {
	var p nar.Parser
	n, _ := p.Feed(b)
	return n
}

func FuzzExport(f *testing.F) {
	f.Add(exportStream(f))
	f.Add(exportStream(f, PathInfo{Path: pathA}, sampleInfo))
	f.Fuzz(func(t *testing.T, data []byte) {
		refuzz(t, data, readExport, func(w *Writer, infos []PathInfo) error {
			_, err := w.Write(exportStream(t, infos...))
			return err
		})
	})
}

// FuzzHandshake reads hellos of all sides. What a client said is what a client
// that says so again is understood to say.
func FuzzHandshake(f *testing.F) {
	for _, rec := range recordings(f) {
		if n := rec.name; n == "nix2.8-info-ng" || n == "nix2.34-info-ng" || n == "nix2.8-info-ssh" {
			f.Add(uint8(6), rec.c2s)
			f.Add(uint8(6), rec.s2c)
		}
	}
	f.Add(uint8(6), numbers(workerClientMagic, 0x115, 1, 0, 0))
	f.Fuzz(func(t *testing.T, n uint8, data []byte) {
		mine := Hello{Version: anyVersion(workerVersions, n), Nix: "nbd", Trust: Trusted}
		reader := func() *Reader { return NewReader(bytes.NewReader(data)) }
		discard := NewWriter(io.Discard)
		_, _ = ServeServerHandshake(reader(), discard, MaxServe)
		_, _ = ServeClientHandshake(reader(), discard, MaxServe)
		_, _, _ = ClientHandshake(reader(), discard, mine)

		var answer bytes.Buffer
		w := NewWriter(&answer)
		theirs, v, err := ServerHandshake(reader(), w, mine)
		if err != nil || w.Flush() != nil {
			return
		}
		var hello bytes.Buffer
		heard, u, err := ClientHandshake(NewReader(&answer), NewWriter(&hello), theirs)
		if err != nil || u != v || heard.Version != mine.Version {
			t.Fatalf("client hears %+v, %v, speaks %v for %v", heard, err, u, v)
		}
		again, u, err := ServerHandshake(NewReader(&hello), discard, mine)
		if err != nil || u != v || again.Version != theirs.Version || !slices.Equal(again.Features, theirs.Features) {
			t.Fatalf("server hears %+v, then %+v, %v", theirs, again, err)
		}
	})
}
