package nixproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nbd/nixproto/nar"
)

const wireDir = "../testdata/wire"

// A recording is one session of real Nix, see testdata/wire/README.md.
type recording struct {
	name     string
	c2s, s2c []byte
}

// recordings returns all sessions in which both sides spoke.
func recordings(t testing.TB) []recording {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(wireDir, "*.c2s"))
	if err != nil || len(names) < 100 {
		t.Fatalf("recordings: %d found, %v", len(names), err)
	}
	var out []recording
	for _, name := range names {
		r := recording{name: strings.TrimSuffix(filepath.Base(name), ".c2s")}
		if r.c2s, err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
		if r.s2c, err = os.ReadFile(strings.TrimSuffix(name, "c2s") + "s2c"); err != nil {
			t.Fatal(err)
		}
		if len(r.s2c) > 0 {
			out = append(out, r)
		}
	}
	return out
}

// A side is one direction of a recording: what is left to decode, and what the
// decoded values were encoded to.
type side struct {
	*Reader
	src *sliceSource
	out bytes.Buffer
	w   *Writer
}

func newSide(b []byte) *side {
	s := &side{src: &sliceSource{b}}
	s.Reader = &Reader{src: s.src}
	s.w = NewWriter(&s.out)
	return s
}

// since returns what was decoded since the rest was before.
func (s *side) since(before []byte) []byte { return before[:len(before)-len(s.src.rest)] }

// sliceSource is a Source whose position can be seen.
type sliceSource struct{ rest []byte }

func (s *sliceSource) Peek() ([]byte, error) {
	if len(s.rest) == 0 {
		return nil, io.EOF
	}
	return s.rest, nil
}
func (s *sliceSource) Discard(n int) { s.rest = s.rest[n:] }
func (s *sliceSource) Ready() bool   { return true }

// A session decodes a recording and encodes it again.
type session struct {
	t    testing.TB
	c, s *side
	v    Version
	note func(piece) // is told each piece of the recording
}

// A piece is one message of a recording, as its bytes.
type piece struct {
	kind  string // "request", "response", "log", "framed", "serve request", "serve response"
	v     Version
	op    uint64
	bytes []byte
}

// errCut says that a recording ends inside an answer, as after a Ctrl-C.
var errCut = errors.New("recording was cut")

// TestRecordings reads both directions of every recording to the last byte,
// writes them again, and wants the same bytes.
func TestRecordings(t *testing.T) {
	seen := map[string]int{}
	for _, rec := range recordings(t) {
		t.Run(rec.name, func(t *testing.T) {
			s := newSession(t, rec, func(p piece) {
				switch p.kind {
				case "request":
					seen[Op(p.op).String()]++
				case "serve request":
					seen["serve/"+ServeCommand(p.op).String()]++
				}
			})
			err := s.run()
			cut := strings.Contains(rec.name, "hook-interrupt") && errors.Is(err, errCut)
			if err != nil && !cut {
				t.Fatal(err)
			}
			s.same("client", s.c, rec.c2s, false)
			s.same("server", s.s, rec.s2c, cut)
		})
	}
	for _, op := range recordedOps {
		if seen[op] == 0 {
			t.Errorf("no recording has %s", op)
		}
	}
}

// recordedOps are the operations that real clients were seen to send.
var recordedOps = strings.Fields(`IsValidPath QueryReferrers AddToStore BuildPaths EnsurePath AddTempRoot FindRoots
	CollectGarbage QueryPathInfo QueryValidPaths QueryValidDerivers OptimiseStore VerifyStore
	BuildDerivation AddSignatures NarFromPath AddToStoreNar QueryMissing QueryDerivationOutputMap RegisterDrvOutput
	QueryRealisation AddMultipleToStore AddBuildLog BuildPathsWithResults serve/QueryValidPaths serve/QueryPathInfos
	serve/DumpStorePath serve/QueryClosure serve/BuildDerivation serve/AddToStoreNar`)

func newSession(t testing.TB, rec recording, note func(piece)) *session {
	return &session{t: t, c: newSide(rec.c2s), s: newSide(rec.s2c), note: note}
}

func (s *session) run() error {
	if binary.LittleEndian.Uint64(s.c.src.rest) == serveClientMagic {
		return s.serve()
	}
	return s.worker()
}

// same compares what was decoded and encoded again with the recording; of one
// that was cut, as far as it goes.
func (s *session) same(who string, side *side, want []byte, cut bool) {
	s.t.Helper()
	if err := side.w.Flush(); err != nil {
		s.t.Fatal(err)
	}
	got := side.out.Bytes()
	if cut {
		want = want[:min(len(want), len(got))]
	} else if n := len(side.src.rest); n > 0 {
		s.t.Errorf("%s: %d bytes are left over", who, n)
	}
	if i := firstDifference(got, want); i >= 0 {
		s.t.Errorf("%s: %d bytes for %d, different at %d: %q, want %q", who, len(got), len(want), i,
			excerpt(got, i), excerpt(want, i))
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	return -1
}

func excerpt(b []byte, i int) []byte { return b[max(0, i-40):min(len(b), i+40)] }

func (s *session) worker() error {
	client := Hello{Version: Version(binary.LittleEndian.Uint64(s.c.src.rest[8:]))}
	server, v, err := ClientHandshake(s.s.Reader, s.c.w, client)
	if err != nil {
		return err
	}
	heard, u, err := ServerHandshake(s.c.Reader, s.s.w, server)
	if err != nil {
		return err
	}
	if heard.Version != client.Version || u != v {
		s.t.Errorf("server side read %v and speaks %v; client said %v and speaks %v", heard.Version, u, client.Version, v)
	}
	s.v = v
	for _, err = s.messages(); err == nil; {
		err = s.operation()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// messages copies the server's messages up to the last of an operation, and
// reports whether that was LogLast.
func (s *session) messages() (bool, error) {
	for {
		before := s.s.src.rest
		m, err := ReadLog(s.s.Reader, s.v)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return false, errCut
		}
		if err != nil {
			return false, err
		}
		s.note(piece{"log", s.v, m.code(), s.s.since(before)})
		if err := WriteLog(s.s.w, s.v, m); err != nil {
			return false, err
		}
		switch m.(type) {
		case *LogLast:
			return true, nil
		case *LogError:
			return false, nil
		}
	}
}

func (s *session) operation() error {
	before := s.c.src.rest
	req, err := ReadRequest(s.c.Reader, s.v)
	if err != nil {
		return err
	}
	s.note(piece{"request", s.v, uint64(req.Op()), s.c.since(before)})
	if err := WriteRequest(s.c.w, s.v, req); err != nil {
		return err
	}
	if err := s.upload(req); err != nil {
		return err
	}
	ok, err := s.messages()
	if err != nil || !ok {
		return err
	}
	before = s.s.src.rest
	resp, err := ReadResponse(s.s.Reader, s.v, req)
	if err != nil {
		return err
	}
	s.note(piece{"response", s.v, uint64(req.Op()), s.s.since(before)})
	if err := WriteResponse(s.s.w, s.v, resp); err != nil {
		return err
	}
	if req.Op() == OpNarFromPath {
		return copyNar(s.s.Reader, s.s.w)
	}
	return nil
}

// upload copies the framed stream that follows req, if one does.
func (s *session) upload(req Request) error {
	var decode func(r *Reader, w *Writer) error
	switch req := req.(type) {
	case *AddToStoreNar:
		decode = copyNar
	case *AddMultipleToStore:
		decode = copyPaths
	case *AddBuildLog:
		decode = copyRaw
	case *AddToStore:
		decode = copyRaw
		if strings.Contains(req.Method, ":r:") {
			decode = copyNar
		}
	default:
		return nil
	}
	before := s.c.src.rest
	framed := NewFramedReader(s.c.Reader)
	var payload bytes.Buffer
	w := NewWriter(&payload)
	if err := decode(&framed.Reader, w); err != nil {
		return err
	}
	if err := errors.Join(framed.Finish(), w.Flush()); err != nil {
		return err
	}
	s.note(piece{"framed", s.v, uint64(req.Op()), s.c.since(before)})
	return reframe(s.c.w, s.c.since(before), payload.Bytes())
}

// reframe writes payload in frames of the sizes that those in recorded have.
func reframe(w *Writer, recorded, payload []byte) error {
	fw := NewFramedWriter(w)
	for {
		n := min(binary.LittleEndian.Uint64(recorded), uint64(len(payload)))
		if n == 0 {
			break
		}
		if _, err := fw.Write(payload[:n]); err != nil {
			return err
		}
		recorded, payload = recorded[8+n:], payload[n:]
	}
	if len(payload) > 0 {
		return errors.New("payload is longer than the recorded frames")
	}
	return fw.Close()
}

// copyNar copies exactly one NAR.
func copyNar(r *Reader, w *Writer) error {
	var p nar.Parser
	for !p.Done() {
		b, err := r.Peek()
		if err != nil {
			return errors.Join(err, p.Close())
		}
		n, err := p.Feed(b)
		if err != nil {
			return err
		}
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		r.Discard(n)
	}
	return nil
}

func copyRaw(r *Reader, w *Writer) error {
	_, err := io.Copy(w, r)
	return err
}

func copyPaths(r *Reader, w *Writer) error {
	n := r.Uint64()
	w.Uint64(n)
	for range n {
		info, err := ReadPathInfo(r)
		if err != nil {
			return err
		}
		if err := WritePathInfo(w, info); err != nil {
			return err
		}
		if err := copyNar(r, w); err != nil {
			return err
		}
	}
	return r.Err()
}

func (s *session) serve() error {
	mine := Version(binary.LittleEndian.Uint64(s.c.src.rest[8:]))
	theirs := Version(binary.LittleEndian.Uint64(s.s.src.rest[8:]))
	var err error
	if s.v, err = ServeClientHandshake(s.s.Reader, s.c.w, mine); err != nil {
		return err
	}
	if _, err = ServeServerHandshake(s.c.Reader, s.s.w, theirs); err != nil {
		return err
	}
	for err == nil {
		err = s.command()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

func (s *session) command() error {
	before := s.c.src.rest
	req, err := ReadServeRequest(s.c.Reader, s.v)
	if err != nil {
		return err
	}
	s.note(piece{"serve request", s.v, uint64(req.Command()), s.c.since(before)})
	if err := WriteServeRequest(s.c.w, s.v, req); err != nil {
		return err
	}
	if req.Command() == CmdAddToStoreNar {
		if err := copyNar(s.c.Reader, s.c.w); err != nil {
			return err
		}
	}
	before = s.s.src.rest
	resp, err := ReadServeResponse(s.s.Reader, s.v, req)
	if err != nil {
		return err
	}
	s.note(piece{"serve response", s.v, uint64(req.Command()), s.s.since(before)})
	if err := WriteResponse(s.s.w, s.v, resp); err != nil {
		return err
	}
	if req.Command() == CmdDumpStorePath {
		return copyNar(s.s.Reader, s.s.w)
	}
	return nil
}
