package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
	"nbd/vm"
)

// newBuildServer is a test server that builds, with a fake runner.
func newBuildServer(t *testing.T) (*testServer, *fakeRunner, *Builds) {
	t.Helper()
	runner := &fakeRunner{status: vm.Status{Accel: "kvm"}, acts: map[string]func(*fakeRun) error{}, runs: map[string]int{}}
	var builds *Builds
	ts := newTestServer(t, func(c *Config) {
		var err error
		if builds, err = NewBuilds(context.Background(), BuildsConfig{Store: c.Store, Runner: runner, Room: Room{Guests: 1, MemoryMiB: 1 << 20, CPUs: 100}}); err != nil {
			t.Fatal(err)
		}
		c.Builder, c.Control = builds, builds
	})
	t.Cleanup(builds.Close)
	return ts, runner, builds
}

// startBuild asks for a build in the background; the answer comes on a channel.
func (ts *testServer) startBuild(t *testing.T, name string) <-chan *nixproto.BuildResult {
	t.Helper()
	d := drv(name, "out")
	out := builtPath(t, name, name).Path
	d.Outputs["out"], d.Env["out"] = nixproto.DerivationOutput{Path: out}, string(out)
	path, err := nixproto.MakeTextPath(name+".drv", nixproto.SumSHA256(d.ATerm()), nil)
	if err != nil {
		t.Fatal(err)
	}
	w := ts.worker(ts.alice)
	answer := make(chan *nixproto.BuildResult, 1)
	go func() {
		resp, err := w.Do(&nixproto.BuildDerivation{DrvPath: path, Derivation: d}, nil)
		if err != nil {
			t.Error(err)
			close(answer)
			return
		}
		answer <- resp.(*nixproto.BuildResult)
	}()
	return answer
}

// until gives f's answer time to become true; builds tell of their states by
// records alone.
func (ts *testServer) until(t *testing.T, args string, want int) []apiBuild {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		var list []apiBuild
		ts.api(ts.alice, "builds list "+args, &list)
		if len(list) == want {
			return list
		}
		if ctx.Err() != nil {
			t.Fatalf("builds list %s: %+v, want %d", args, list, want)
		}
	}
}

func TestControlOfBuilds(t *testing.T) {
	ts, runner, _ := newBuildServer(t)
	bob := newKey(t)
	ts.addAccount("bob", bob, nil)
	started, finish := make(chan struct{}, 8), make(chan struct{})
	runner.act("slow", func(f *fakeRun) error {
		f.say("first line")
		started <- struct{}{}
		select {
		case <-finish:
			f.say("last line")
			return f.writeContent()
		case <-f.ctx.Done():
			return f.ctx.Err()
		}
	})
	answer := ts.startBuild(t, "slow")
	<-started
	b := ts.until(t, "--status running", 1)[0]
	id := fmt.Sprint(b.BuildID)

	// Others neither see nor end it.
	for _, line := range []string{"builds show ", "builds log ", "builds cancel ", "builds restart ", "builds attach ", "why "} {
		if out, errs, status := ts.command(bob, "api "+line+id, ""); out != "" || status != 1 || errs != `{"error":"there is no build `+id+"\"}\n" {
			t.Errorf("%s of another: %d %s %s", line, status, out, errs)
		}
	}
	// The log comes while it runs.
	follow := ts.exec(ts.dial(ts.alice), "api builds log "+id)
	line := make([]byte, len("first line\n"))
	if _, err := io.ReadFull(follow, line); err != nil || string(line) != "first line\n" {
		t.Fatalf("live log %q, %v", line, err)
	}
	if _, errs, status := ts.command(ts.alice, "api builds restart "+id, ""); status != 1 || !strings.Contains(errs, "has not ended") {
		t.Errorf("restart of what runs: %d %s", status, errs)
	}
	var act apiAct
	ts.api(ts.alice, "builds cancel "+id, &act)
	if act.Act != "cancelled" || fmt.Sprint(act.BuildID) != id {
		t.Errorf("%+v", act)
	}
	if r := <-answer; r == nil || r.Status == nixproto.Built || !strings.Contains(r.Error, "cancelled") {
		t.Errorf("cancelled build: %+v", r)
	}
	if rest, err := io.ReadAll(follow); err != nil || len(rest) != 0 {
		t.Errorf("after its end the log has %q, %v", rest, err)
	}
	ts.until(t, "--status cancelled", 1)
	if _, errs, status := ts.command(ts.alice, "api builds cancel "+id, ""); status != 1 || !strings.Contains(errs, "has ended") {
		t.Errorf("cancel again: %d %s", status, errs)
	}

	// Made again, and followed to its end.
	ts.api(ts.alice, "builds restart "+id, &act)
	<-started
	next := fmt.Sprint(act.BuildID)
	if act.RestartOf == nil || fmt.Sprint(*act.RestartOf) != id || next == id {
		t.Errorf("%+v", act)
	}
	attach := ts.exec(ts.dial(ts.alice), "shell builds attach "+next)
	if _, err := io.ReadFull(attach, line); err != nil || string(line) != "first line\n" {
		t.Fatalf("attached: %q, %v", line, err)
	}
	close(finish)
	rest, err := io.ReadAll(attach)
	if want := "last line\nbuild " + next + ": built\n"; err != nil || string(rest) != want {
		t.Errorf("attached to the end: %q, %v; want %q", rest, err, want)
	}
	var ended apiBuild
	ts.api(ts.alice, "builds attach "+next, &ended)
	if ended.Status != store.StatusBuilt || ended.RestartOf == nil || fmt.Sprint(*ended.RestartOf) != id || len(ended.Outputs) != 1 {
		t.Errorf("%+v", ended)
	}
	var w apiWhy
	ts.api(ts.alice, "why "+next, &w)
	if len(w.Decisions) == 0 {
		t.Error("no reasons")
	}
	// Answered without a run, and told so.
	if r := <-ts.startBuild(t, "slow"); r == nil || r.Status != nixproto.AlreadyValid {
		t.Errorf("again: %+v", r)
	}
	ts.until(t, "--status built --reused", 2)
	ts.until(t, "--status built", 1)
}

// TestAttachUntilTheEnd: who is attached to a build sees how it ended, also if
// its client went away and the guest took its time to go.
func TestAttachUntilTheEnd(t *testing.T) {
	ts, runner, builds := newBuildServer(t)
	stopped, release := make(chan struct{}), make(chan struct{})
	runner.act("slow", func(f *fakeRun) error {
		f.say("first line")
		<-f.ctx.Done()
		close(stopped)
		<-release
		return f.ctx.Err()
	})
	d := drv("slow", "out")
	out := builtPath(t, "slow", "slow").Path
	d.Outputs["out"], d.Env["out"] = nixproto.DerivationOutput{Path: out}, string(out)
	path, err := nixproto.MakeTextPath("slow.drv", nixproto.SumSHA256(d.ATerm()), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(t.Context())
	sight := ts.store.NewSight(ts.account.ID, store.Trust{})
	s := &Session{ID: "x", Client: &Client{Account: ts.account, Permissions: store.Permissions()}, book: ts.book,
		Sight: sight, leases: sight.NewLease(), Log: slog.New(slog.DiscardHandler)}
	defer s.leases.Release()
	if err := s.setSettings(); err != nil {
		t.Fatal(err)
	}
	sink := newFakeSink()
	gone := make(chan error, 1)
	go func() {
		_, err := builds.Build(ctx, s, &BuildRequest{DrvPath: path, Drv: d}, sink)
		gone <- err
	}()
	<-sink.grown
	id := ts.until(t, "--status running", 1)[0].BuildID
	attach := ts.exec(ts.dial(ts.alice), fmt.Sprintf("shell builds attach %d", id))
	line := make([]byte, len("first line\n"))
	if _, err := io.ReadFull(attach, line); err != nil {
		t.Fatal(err)
	}
	leave()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	<-stopped
	close(release)
	rest, err := io.ReadAll(attach)
	if want := fmt.Sprintf("build %d: client_disconnect\n", id); err != nil || string(rest) != want {
		t.Errorf("%q, %v; want %q", rest, err, want)
	}
	if r := builds.live.get(id); r != nil {
		t.Error("it is kept for ever")
	}
}

// TestAdminBuilds: the operator sees and ends the builds of all, and takes
// results out.
func TestAdminBuilds(t *testing.T) {
	ts, runner, builds := newBuildServer(t)
	admin := NewAdmin(ts.store, ts.book, nil, ts.Disconnect, slog.New(slog.DiscardHandler))
	admin.builds = builds
	ask := func(method, path string, answer any) error {
		t.Helper()
		w := httptest.NewRecorder()
		admin.http.Handler.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		if w.Code != http.StatusOK {
			return errors.New(w.Body.String())
		}
		if raw, ok := answer.(*bytes.Buffer); ok {
			_, err := w.Body.WriteTo(raw)
			return err
		}
		return json.Unmarshal(w.Body.Bytes(), answer)
	}
	runner.act("done", func(f *fakeRun) error { f.say("\x1bbytes\x00"); return f.writeContent() })
	<-ts.startBuild(t, "done")
	started := make(chan struct{}, 1)
	runner.act("slow", func(f *fakeRun) error { started <- struct{}{}; <-f.ctx.Done(); return f.ctx.Err() })
	first := ts.startBuild(t, "slow")
	<-started
	second := ts.startBuild(t, "waits") // there is room for one

	var queue struct {
		Running, Waiting int
		Builds           []struct {
			ID      uint64 `json:"build_id"`
			Account string
		}
	}
	for ctx, cancel := context.WithTimeout(t.Context(), patience); ; {
		if err := ask("GET", "/queue", &queue); err != nil {
			t.Fatal(err)
		}
		if len(queue.Builds) == 1 {
			cancel()
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("%+v", queue)
		}
	}
	if queue.Running != 1 || queue.Waiting != 1 || queue.Builds[0].Account != "alice" {
		t.Errorf("queue: %+v", queue)
	}
	var list []buildOfAccount
	if err := ask("GET", "/builds?account=alice&status=running", &list); err != nil || len(list) != 1 || list[0].Account != "alice" {
		t.Fatalf("list: %+v, %v", list, err)
	}
	var act apiAct
	if err := ask("POST", fmt.Sprintf("/builds/%d/cancel", list[0].BuildID), &act); err != nil {
		t.Error(err)
	}
	if r := <-first; r == nil || !strings.Contains(r.Error, "operator") {
		t.Errorf("cancelled: %+v", r)
	}
	if r := <-second; r == nil || r.Status != nixproto.Built {
		t.Errorf("the next one: %+v", r)
	}
	if err := ask("GET", "/builds?status=built&limit=1", &list); err != nil || len(list) != 1 || !strings.Contains(list[0].DerivationPath, "waits") {
		t.Errorf("list: %+v, %v", list, err)
	}
	var log bytes.Buffer
	if err := ask("GET", "/builds/1/log", &log); err != nil || log.String() != "\x1bbytes\x00\n" {
		t.Errorf("log %q, %v", log.String(), err)
	}
	var shown buildOfAccount
	if err := ask("GET", "/builds/1", &shown); err != nil || shown.BuildID != 1 || len(shown.Decisions) == 0 {
		t.Errorf("show: %+v, %v", shown, err)
	}
	var revoked struct {
		Key     string
		Records int
	}
	if err := ask("POST", "/results/revoke?what=1", &revoked); err != nil || revoked.Records == 0 {
		t.Errorf("revoke: %+v, %v", revoked, err)
	}
	if err := ask("POST", "/results/revoke?what="+revoked.Key, &revoked); err != nil || revoked.Records != 0 {
		t.Errorf("revoke by key: %+v, %v", revoked, err)
	}
	for path, says := range map[string]string{
		"GET /builds/99": "there is no build 99", "GET /builds/x": "is a number", "GET /builds/99/log": "there is no build",
		"POST /builds/99/cancel": "there is no build", "POST /builds/1/cancel": "has ended", "POST /results/revoke?what=x": "neither",
		"POST /results/revoke?what=99": "there is no build", "GET /builds?status=done": "no status", "GET /builds?tags=x": "NAME:VALUE",
		"GET /builds?limit=-1": "at most", "GET /builds?account=nobody": "no account",
	} {
		method, path, _ := strings.Cut(path, " ")
		if err := ask(method, path, &struct{}{}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
