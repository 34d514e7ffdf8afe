package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nbd/nixproto"
)

// The recordings in testdata/wire are sessions of real Nix clients with real
// Nix servers. Here the client's half of each is sent to this server, whose
// store holds what the recorded server's store held and whose builder builds
// what was built then; the answers are compared with the recorded ones.

// An exchange is one operation or command of a recording, and its answer.
type exchange struct {
	req    nixproto.Request      // one of req and cmd is set
	cmd    nixproto.ServeRequest //
	stream []byte                // behind the request
	failed bool                  // answered with an error
	resp   nixproto.Response
	nar    []byte   // behind the response
	lines  []string // of builders
}

// A recording is a session, decoded.
type recording struct {
	name       string
	c2s        []byte
	v          nixproto.Version
	exchanges  []*exchange
	stderr     string
	infos      map[nixproto.StorePath]*nixproto.PathInfo
	nars       map[nixproto.StorePath][]byte
	before     []nixproto.StorePath               // valid when the session began
	built      map[*exchange][]nixproto.StorePath // made valid by a build
	realised   []nixproto.Realisation             // known when the session began
	registered map[nixproto.StorePath]bool
	uploads    map[nixproto.StorePath]testPath // of all recordings

	mu sync.Mutex // guards infos, nars and registered while the recording is replayed
}

func (x *exchange) name() string {
	if x.cmd != nil {
		return x.cmd.Command().String()
	}
	return x.req.Op().String()
}

// decodeRecording returns nil for a session in which the server said nothing,
// or was so old that the same client would say other things to this one.
func decodeRecording(t *testing.T, file string, uploads map[nixproto.StorePath]testPath) *recording {
	t.Helper()
	rec := &recording{
		uploads: uploads, name: strings.TrimSuffix(filepath.Base(file), ".c2s"), infos: map[nixproto.StorePath]*nixproto.PathInfo{},
		nars: map[nixproto.StorePath][]byte{}, built: map[*exchange][]nixproto.StorePath{},
		registered: map[nixproto.StorePath]bool{},
	}
	base := strings.TrimSuffix(file, ".c2s")
	var err error
	if rec.c2s, err = os.ReadFile(file); err != nil {
		t.Fatal(err)
	}
	s2c, err := os.ReadFile(base + ".s2c")
	if err != nil {
		t.Fatal(err)
	}
	if stderr, err := os.ReadFile(base + ".stderr"); err == nil {
		rec.stderr = string(stderr)
	}
	if len(s2c) == 0 {
		return nil
	}
	c, s := nixproto.NewReader(bytes.NewReader(rec.c2s)), nixproto.NewReader(bytes.NewReader(s2c))
	if strings.Contains(rec.name, "-ssh") || strings.Contains(rec.name, "copyclosure") {
		rec.decodeServe(t, c, s)
	} else if !rec.decodeWorker(t, c, s) {
		return nil
	}
	rec.whatWasThere()
	return rec
}

func (rec *recording) decodeWorker(t *testing.T, c, s *nixproto.Reader) bool {
	t.Helper()
	mine := nixproto.Hello{Version: nixproto.Version(binary.LittleEndian.Uint64(rec.c2s[8:]))}
	theirs, v, err := nixproto.ClientHandshake(s, nixproto.NewWriter(io.Discard), mine)
	if err == nil {
		_, _, err = nixproto.ServerHandshake(c, nixproto.NewWriter(io.Discard), theirs)
	}
	if err != nil {
		t.Fatal(err)
	}
	rec.v = v
	if v < min(mine.Version, nixproto.MaxWorker) {
		return false
	}
	read := func(x *exchange) error {
		for {
			m, err := nixproto.ReadLog(s, v)
			if err != nil {
				return err
			}
			switch m := m.(type) {
			case *nixproto.LogLast:
				return nil
			case *nixproto.LogError:
				x.failed = true
				return nil
			case *nixproto.LogResult:
				if m.Type == nixproto.ResBuildLogLine {
					x.lines = append(x.lines, m.Fields[0].Text)
				}
			}
		}
	}
	err = read(new(exchange))
	for err == nil {
		x := new(exchange)
		if x.req, err = nixproto.ReadRequest(c, v); err != nil {
			break
		}
		if stream := payload(x.req, c); stream != nil {
			x.stream, err = io.ReadAll(stream)
		}
		if err == nil {
			err = read(x)
		}
		if err == nil && !x.failed {
			x.resp, err = nixproto.ReadResponse(s, v, x.req)
		}
		if q, ok := x.req.(*nixproto.NarFromPath); ok && err == nil && !x.failed {
			x.nar, err = readNAR(s)
			rec.nars[q.Path] = x.nar
		}
		if err == nil {
			rec.exchanges = append(rec.exchanges, x)
		}
	}
	// A recording that was cut by a Ctrl-C ends inside an answer.
	if err != io.EOF && !strings.Contains(rec.name, "interrupt") {
		t.Fatal(err)
	}
	return true
}

func (rec *recording) decodeServe(t *testing.T, c, s *nixproto.Reader) {
	t.Helper()
	theirs := nixproto.MaxServe
	v, err := nixproto.ServeServerHandshake(c, nixproto.NewWriter(io.Discard), theirs)
	if err == nil {
		_, err = nixproto.ServeClientHandshake(s, nixproto.NewWriter(io.Discard), v)
	}
	rec.v = v
	for err == nil {
		x := new(exchange)
		if x.cmd, err = nixproto.ReadServeRequest(c, v); err != nil {
			break
		}
		if _, ok := x.cmd.(*nixproto.ServeAddToStoreNar); ok {
			x.stream, err = readNAR(c)
		}
		if err == nil {
			x.resp, err = nixproto.ReadServeResponse(s, v, x.cmd)
		}
		if q, ok := x.cmd.(*nixproto.ServeDumpStorePath); ok && err == nil {
			x.nar, err = readNAR(s)
			rec.nars[q.Path] = x.nar
		}
		rec.exchanges = append(rec.exchanges, x)
	}
	if err != io.EOF {
		t.Fatal(err)
	}
}

func readNAR(r *nixproto.Reader) ([]byte, error) {
	var b bytes.Buffer
	err := copyNAR(&b, r)
	return b.Bytes(), err
}

// whatWasThere finds out from the answers what the recorded server's store held
// when the session began, and what each build added.
func (rec *recording) whatWasThere() {
	brought := map[nixproto.StorePath]bool{}
	var build *exchange
	valid := func(paths ...nixproto.StorePath) {
		for _, p := range paths {
			if p == "" || brought[p] {
				continue
			}
			brought[p] = true
			if build != nil {
				rec.built[build] = append(rec.built[build], p)
			} else {
				rec.before = append(rec.before, p)
			}
		}
	}
	know := func(info *nixproto.PathInfo) {
		if rec.infos[info.Path] == nil {
			rec.infos[info.Path] = info
		}
		valid(info.References...)
		valid(info.Path)
	}
	upload := func(info *nixproto.PathInfo) {
		valid(slices.DeleteFunc(slices.Clone(info.References), func(p nixproto.StorePath) bool { return p == info.Path })...)
		brought[info.Path] = true
	}
	for _, x := range rec.exchanges {
		if x.failed {
			continue
		}
		switch q := x.req.(type) {
		case *nixproto.IsValidPath:
			if *x.resp.(*nixproto.Bool) {
				valid(q.Path)
			}
		case *nixproto.QueryPathInfo:
			if info := x.resp.(*nixproto.OptionalPathInfo).Info; info != nil {
				know(info)
			}
		case *nixproto.AddToStoreNar:
			upload(&q.Info)
		case *nixproto.AddToStore:
			upload(&x.resp.(*nixproto.ValidPathInfo).Info)
		case *nixproto.AddMultipleToStore:
			r := nixproto.NewReader(bytes.NewReader(x.stream))
			for range r.Uint64() {
				info, err := nixproto.ReadPathInfo(r)
				if err != nil {
					return
				}
				upload(info)
				nar, err := readNAR(r)
				if err != nil {
					return
				}
				rec.uploads[info.Path] = testPath{*info, nar}
			}
		case *nixproto.BuildDerivation, *nixproto.BuildPaths, *nixproto.BuildPathsWithResults:
			if build = x; x.resp != nil {
				valid(outputsIn(x.resp)...)
			}
		case *nixproto.NarFromPath:
			valid(q.Path)
		case *nixproto.EnsurePath:
			valid(q.Path)
		case *nixproto.CollectGarbage:
			for _, p := range x.resp.(*nixproto.Collected).Paths {
				valid(nixproto.StorePath(p))
			}
		case *nixproto.RegisterDrvOutput:
			valid(q.Realisation.OutPath)
		case *nixproto.QueryRealisation:
			for _, r := range *x.resp.(*nixproto.RealisationSet) {
				valid(r.OutPath)
				rec.realised = append(rec.realised, r)
			}
		case *nixproto.QueryReferrers:
			valid(q.Path)
		}
		if set, ok := x.resp.(*nixproto.PathSet); ok {
			valid(*set...)
		}
		switch q := x.cmd.(type) {
		case *nixproto.ServeQueryPathInfos:
			for i := range *x.resp.(*nixproto.ServePathInfos) {
				know(&(*x.resp.(*nixproto.ServePathInfos))[i])
			}
		case *nixproto.ServeAddToStoreNar:
			upload(&q.Info)
		case *nixproto.ServeBuildDerivation:
			build = x
			valid(outputsIn(x.resp)...)
		case *nixproto.ServeDumpStorePath:
			valid(q.Path)
		}
	}
}

// outputsIn returns the outputs that a build's answer names; those of opaque
// paths are the paths.
func outputsIn(resp nixproto.Response) []nixproto.StorePath {
	var paths []nixproto.StorePath
	one := func(r *nixproto.BuildResult) {
		for _, o := range r.Outputs {
			paths = append(paths, o.OutPath)
		}
	}
	switch resp := resp.(type) {
	case *nixproto.BuildResult:
		one(resp)
	case *nixproto.BuildResults:
		for i := range *resp {
			one(&(*resp)[i].BuildResult)
			if p := (*resp)[i].Path; !p.Built() && (*resp)[i].Status.Success() {
				paths = append(paths, p.Path)
			}
		}
	}
	return paths
}

// restore makes paths valid, what they refer to first. Where the recording does
// not have the content, another one stands in for it.
func (rec *recording) restore(ts *testServer, paths []nixproto.StorePath) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	var todo []testPath
	var visit func(p nixproto.StorePath)
	visit = func(p nixproto.StorePath) {
		if rec.registered[p] {
			return
		}
		rec.registered[p] = true
		tp := testPath{PathInfo: nixproto.PathInfo{Path: p}, nar: rec.nars[p]}
		if info := rec.infos[p]; info != nil {
			tp.PathInfo = *info
			tp.Signatures = nil
			for _, ref := range info.References {
				visit(ref)
			}
		}
		if up, ok := rec.uploads[p]; ok && nixproto.SumSHA256(tp.nar) != tp.NarHash {
			rec.infos[p], rec.nars[p] = &up.PathInfo, up.nar
			rec.registered[p] = false
			visit(p)
			return
		}
		if nixproto.SumSHA256(tp.nar) != tp.NarHash {
			contents := string(p)
			if p.IsDerivation() {
				contents = `Derive([("out","` + string(p) + `-out","","")],[],[],"x86_64-linux","/bin/sh",[],[])`
			}
			tp.nar, tp.CA = narOf(ts.t, contents), ""
			tp.NarHash, tp.NarSize = nixproto.SumSHA256(tp.nar), uint64(len(tp.nar))
			tp.References = slices.DeleteFunc(slices.Clone(tp.References), func(r nixproto.StorePath) bool { return p.IsDerivation() })
		}
		todo = append(todo, tp)
	}
	for _, p := range paths {
		visit(p)
	}
	ts.upload(ts.account.ID, todo...)
}

// play makes the fake builder do what was done in the recording.
func (rec *recording) play(ts *testServer) {
	next := func(match func(*exchange) bool) *exchange {
		for i, x := range rec.exchanges {
			if match(x) {
				rec.exchanges = slices.Clone(rec.exchanges)
				rec.exchanges[i] = new(exchange) // done
				return x
			}
		}
		return nil
	}
	run := func(x *exchange, drv nixproto.StorePath, log LogSink) {
		if len(x.lines) > 0 || x.cmd != nil {
			b := log.StartBuild(drv)
			_, _ = io.WriteString(b, strings.Join(x.lines, "\n"))
			if x.cmd != nil {
				_, _ = io.WriteString(b, rec.stderr)
			}
			b.Stop()
		}
		rec.restore(ts, rec.built[x])
	}
	ts.builder.build = func(ctx context.Context, _ *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
		x := next(func(x *exchange) bool {
			_, worker := x.req.(*nixproto.BuildDerivation)
			_, serve := x.cmd.(*nixproto.ServeBuildDerivation)
			return worker || serve
		})
		if x == nil {
			<-ctx.Done() // the recording was cut here
			return nil, ctx.Err()
		}
		run(x, req.DrvPath, log)
		if x.failed {
			return nil, refusef("as recorded")
		}
		return x.resp.(*nixproto.BuildResult), nil
	}
	ts.builder.paths = func(_ context.Context, _ *Session, req *PathsRequest, log LogSink) ([]nixproto.KeyedBuildResult, error) {
		x := next(func(x *exchange) bool {
			_, one := x.req.(*nixproto.BuildPaths)
			_, other := x.req.(*nixproto.BuildPathsWithResults)
			return one || other
		})
		run(x, req.Paths[0].Path, log)
		if results, ok := x.resp.(*nixproto.BuildResults); ok {
			return *results, nil
		}
		if x.failed {
			return nil, refusef("as recorded")
		}
		return nil, nil
	}
	ts.builder.missing = func([]nixproto.DerivedPath) (*Missing, error) {
		x := next(func(x *exchange) bool { _, ok := x.req.(*nixproto.QueryMissing); return ok })
		return x.resp.(*nixproto.Missing), nil
	}
	ts.builder.outputs = func(drv nixproto.StorePath) (map[string]nixproto.StorePath, error) {
		x := next(func(x *exchange) bool { _, ok := x.req.(*nixproto.QueryDerivationOutputMap); return ok })
		if x.failed {
			return nil, notValid(drv)
		}
		return *x.resp.(*nixproto.OutputMap), nil
	}
}

func TestReplay(t *testing.T) {
	files, err := filepath.Glob("../testdata/wire/*.c2s")
	if err != nil || len(files) < 100 {
		t.Fatalf("recordings: %d found, %v", len(files), err)
	}
	ts := newTestServer(t, nil)
	var recordings []*recording
	uploads := map[nixproto.StorePath]testPath{}
	for _, file := range files {
		if rec := decodeRecording(t, file, uploads); rec != nil {
			recordings = append(recordings, rec)
		}
	}
	if len(recordings) < 140 {
		t.Errorf("only %d recordings can be replayed", len(recordings))
	}
	for _, rec := range recordings {
		t.Run(rec.name, func(t *testing.T) {
			key := newKey(t)
			sub := *ts
			sub.t = t
			sub.account = sub.addAccount(strings.ReplaceAll(rec.name, ".", "-"), key, nil)
			replay(t, &sub, rec, sub.exec(sub.dial(key), execOf(rec)))
		})
	}
}

func execOf(rec *recording) string {
	if rec.v < 2<<8 {
		return "nix-daemon --stdio"
	}
	return "nix-store --serve --write"
}

// replay sends a recording as it is and reads the answers.
func replay(t *testing.T, ts *testServer, rec *recording, p *pipe) {
	want := rec.exchanges
	rec.restore(ts, rec.before)
	for i := range rec.realised {
		if err := ts.store.AddRealisation(t.Context(), ts.account.ID, &rec.realised[i]); err != nil {
			t.Fatal(err)
		}
	}
	rec.play(ts)
	sent := make(chan error, 1)
	go func() { _, err := p.Write(rec.c2s); sent <- err }()
	r := nixproto.NewReader(p)
	var err error
	if rec.v < 2<<8 {
		mine := nixproto.Hello{Version: nixproto.Version(binary.LittleEndian.Uint64(rec.c2s[8:]))}
		if _, _, err = nixproto.ClientHandshake(r, nixproto.NewWriter(io.Discard), mine); err == nil {
			_, err = nixproto.ReadLog(r, rec.v)
		}
	} else {
		_, err = nixproto.ServeClientHandshake(r, nixproto.NewWriter(io.Discard), rec.v)
	}
	for _, x := range want {
		if err != nil {
			break
		}
		err = rec.compare(t, x, r)
	}
	if err := errors.Join(err, <-sent, p.Close()); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(r); !strings.Contains(rec.name, "interrupt") && (err != nil || len(rest) > 0) {
		t.Errorf("%d bytes behind the last answer, %v", len(rest), err)
	}
	if status := p.status(t); status != 0 && !strings.Contains(rec.name, "interrupt") {
		t.Errorf("exit status %d", status)
	}
	if rec.v >= 2<<8 && p.stderr.String() != rec.stderr {
		t.Errorf("stderr %q, want %q", p.stderr, rec.stderr)
	}
}

// compare reads the answer to an exchange.
func (rec *recording) compare(t *testing.T, x *exchange, r *nixproto.Reader) error {
	var resp nixproto.Response
	var err error
	if x.cmd != nil {
		resp, err = nixproto.ReadServeResponse(r, rec.v, x.cmd)
	} else {
		var lines []string
		failed := false
		for last := false; !last && err == nil; {
			var m nixproto.LogMessage
			m, err = nixproto.ReadLog(r, rec.v)
			switch m := m.(type) {
			case *nixproto.LogLast:
				last = true
			case *nixproto.LogError:
				failed, last = true, true
				if !x.failed {
					t.Errorf("%s: %s", x.name(), m.Message)
				}
			case *nixproto.LogResult:
				if m.Type == nixproto.ResBuildLogLine {
					lines = append(lines, m.Fields[0].Text)
				}
			}
		}
		if diff := cmp.Diff(x.lines, lines); diff != "" {
			t.Errorf("%s: log: %s", x.name(), diff)
		}
		if err != nil || failed {
			return err
		}
		if x.failed {
			t.Errorf("%s succeeds", x.name())
		}
		resp, err = nixproto.ReadResponse(r, rec.v, x.req)
	}
	if err != nil {
		return err
	}
	rec.compareResponse(t, x, resp)
	if x.nar != nil {
		nar, err := readNAR(r)
		if err != nil {
			return err
		}
		if !bytes.Equal(nar, x.nar) && !rec.stoodIn(pathOf(x)) {
			t.Errorf("%s: another NAR", x.name())
		}
	}
	return nil
}

func pathOf(x *exchange) nixproto.StorePath {
	switch q := x.req.(type) {
	case *nixproto.NarFromPath:
		return q.Path
	case *nixproto.QueryPathInfo:
		return q.Path
	}
	if q, ok := x.cmd.(*nixproto.ServeDumpStorePath); ok {
		return q.Path
	}
	return ""
}

// stoodIn reports whether a path has other content than it had.
func (rec *recording) stoodIn(p nixproto.StorePath) bool {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	info := rec.infos[p]
	return rec.registered[p] && (info == nil || nixproto.SumSHA256(rec.nars[p]) != info.NarHash)
}

// compareResponse compares what does not depend on time, or on content that
// the recording does not have.
func (rec *recording) compareResponse(t *testing.T, x *exchange, got nixproto.Response) {
	t.Helper()
	want := x.resp
	switch w := want.(type) {
	case *nixproto.Roots:
		return // this server has none
	case *nixproto.Collected:
		if g := got.(*nixproto.Collected); !cmp.Equal(w.Paths, g.Paths) {
			t.Errorf("%s: deleted %v, want %v", x.name(), g.Paths, w.Paths)
		}
		return
	case *nixproto.OptionalPathInfo:
		g := got.(*nixproto.OptionalPathInfo)
		if w.Info != nil && g.Info != nil {
			want, got = rec.comparable(w.Info), rec.comparable(g.Info)
		}
	case *nixproto.ValidPathInfo:
		want, got = rec.comparable(&w.Info), rec.comparable(&got.(*nixproto.ValidPathInfo).Info)
	case *nixproto.ServePathInfos:
		for i := range *w {
			(*w)[i] = rec.comparable(&(*w)[i]).Info
		}
		g := *got.(*nixproto.ServePathInfos)
		for i := range g {
			g[i] = rec.comparable(&g[i]).Info
		}
	}
	opts := cmp.Options{cmpopts.EquateEmpty(), cmp.AllowUnexported(nixproto.Hash{}), cmpopts.IgnoreUnexported(nixproto.OptionalPathInfo{})}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("%s: %s", x.name(), diff)
	}
}

// comparable leaves out what two servers may see differently.
func (rec *recording) comparable(info *nixproto.PathInfo) *nixproto.ValidPathInfo {
	c := *info
	c.RegistrationTime, c.Ultimate, c.Signatures = 0, false, nil
	if rec.stoodIn(c.Path) {
		c.NarHash, c.NarSize, c.CA = nixproto.Hash{}, 0, ""
		if c.Path.IsDerivation() {
			c.References = nil
		}
	}
	return &nixproto.ValidPathInfo{Info: c}
}
