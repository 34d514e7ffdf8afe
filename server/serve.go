package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// A session of the serve protocol (nix-store --serve) is a handshake and then
// one command after the other, each with its response right behind it. There
// are no messages and no errors: a command that fails is told on the channel's
// stderr, and ends the session with exit status 1. Stderr is the build log, too.

// A serveConn serves one session of the serve protocol.
type serveConn struct {
	*session
	in     requests
	r      *nixproto.Reader
	w      *nixproto.Writer
	v      nixproto.Version
	stderr *serveLog
	write  bool // the client may change things, as it said itself
}

// serveServe serves the serve protocol on a session's channel until the client
// leaves, and returns the exit status.
func serveServe(ss *session, write bool) int {
	r := nixproto.NewReader(ss.ch)
	r.Count(ss.server.store.NewCharge(ss.Client.Account.ID))
	defer r.Forget()
	c := &serveConn{
		session: ss, in: requests{r: r}, r: r, w: nixproto.NewWriter(ss.ch),
		stderr: &serveLog{w: ss.ch.Stderr()}, write: write,
	}
	var err error
	if c.v, err = nixproto.ServeServerHandshake(c.r, c.w, nixproto.MaxServe); err != nil {
		if err != io.EOF {
			ss.Log.Info("no handshake", "err", err)
			ss.complain(err.Error())
		}
		return endStatus(err)
	}
	for {
		if err := c.in.await(); err != nil {
			if err == io.EOF {
				return 0
			}
			c.Log.Debug("session broken", "err", err)
			return exitError
		}
		if !c.begin() {
			c.complain("the server is shutting down; try again later")
			return exitError
		}
		err := c.command()
		r.Forget()
		if !c.finish() || err != nil {
			return exitError
		}
	}
}

// command serves one command. After an error, which was told, the session is
// over.
func (c *serveConn) command() error {
	req, err := nixproto.ReadServeRequest(c.r, c.v)
	what := "command"
	var resp nixproto.Response
	if err == nil {
		what = req.Command().String()
		resp, err = c.handle(req)
	}
	if err == nil && resp != nil {
		err = nixproto.WriteResponse(c.w, c.v, resp)
	}
	if err == nil {
		err = c.w.Flush()
	}
	if err != nil {
		text, level := explain(c.Session, err)
		c.Log.Log(c.ctx, level, "command failed", "command", what, "err", err)
		c.complain(text)
	}
	return err
}

// handle serves one command; a nil response was written already.
func (c *serveConn) handle(req nixproto.ServeRequest) (nixproto.Response, error) {
	switch q := req.(type) {
	case *nixproto.ServeAddToStoreNar:
		return c.addToStoreNar(q)
	case *nixproto.ServeImportPaths:
		return c.importPaths()
	case *nixproto.ServeBuildDerivation:
		return c.buildDerivation(q)
	case *nixproto.ServeBuildPaths:
		return c.buildPaths(q)
	}
	if err := c.Client.require(StoreRead); err != nil {
		return nil, err
	}
	switch q := req.(type) {
	case *nixproto.ServeQueryValidPaths:
		valid, err := c.validOrFetched(q.Paths, q.Substitute, c.building)
		return answer[nixproto.PathSet](valid, err)
	case *nixproto.ServeQueryPathInfos:
		infos, err := c.pathInfos(q.Paths)
		return answer[nixproto.ServePathInfos](infos, err)
	case *nixproto.ServeQueryClosure:
		closure, err := c.closure(q.Paths, q.IncludeOutputs)
		return answer[nixproto.PathSet](closure, err)
	case *nixproto.ServeDumpStorePath:
		_, blob, err := c.openPath(q.Path)
		if err != nil {
			return nil, err
		}
		defer closeBlob(c.Session, blob)
		return nil, copyBlob(c.ctx, c.w, blob)
	case *nixproto.ServeExportPaths:
		return nil, c.exportPaths(q.Paths)
	default:
		return nil, refusef("%s is not supported by this server", req.Command())
	}
}

// mayWrite reports why a command that changes something is refused.
func (c *serveConn) mayWrite() error {
	if !c.write {
		return refusef("nix-store --serve was started without --write, so nothing can be added or built")
	}
	return nil
}

func (c *serveConn) pathInfos(paths []nixproto.StorePath) ([]nixproto.PathInfo, error) {
	var infos []nixproto.PathInfo
	for _, p := range paths {
		info, err := c.Sight.Info(c.ctx, p)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if info, err = c.vouch(plainSelfAddress(info)); err != nil {
			return nil, err
		}
		infos = append(infos, *info)
	}
	return infos, nil
}

// closure returns the closure of the paths; with outputs also that of the valid
// outputs of all derivations in it.
func (c *serveConn) closure(roots []nixproto.StorePath, outputs bool) ([]nixproto.StorePath, error) {
	looked := map[nixproto.StorePath]bool{}
	for {
		closure, err := c.Sight.Closure(c.ctx, roots)
		if err != nil || !outputs {
			return closure, err
		}
		more, err := c.outputsOf(closure, looked)
		if err != nil || len(more) == 0 {
			return closure, err
		}
		roots = append(closure, more...)
	}
}

// outputsOf returns the valid outputs of derivations that were not looked at
// before.
func (c *serveConn) outputsOf(paths []nixproto.StorePath, looked map[nixproto.StorePath]bool) ([]nixproto.StorePath, error) {
	var found []nixproto.StorePath
	for _, p := range paths {
		if !p.IsDerivation() || looked[p] {
			continue
		}
		looked[p] = true
		outputs, err := c.server.cfg.Builder.OutputMap(c.ctx, c.Session, p)
		if err != nil {
			return nil, err
		}
		for _, out := range outputs {
			if out != "" {
				found = append(found, out)
			}
		}
	}
	return c.Sight.Valid(c.ctx, found)
}

func (c *serveConn) addToStoreNar(q *nixproto.ServeAddToStoreNar) (nixproto.Response, error) {
	if err := c.mayWrite(); err != nil {
		return nil, err
	}
	up, err := c.newUpload(false)
	if err != nil {
		return nil, err
	}
	defer up.Abort()
	if err := c.addTo(up, &q.Info, c.r); err != nil {
		return nil, err
	}
	return &nixproto.Done{}, up.Commit()
}

// asked takes what the options of a build command tell: how old the client is,
// and its limits; 0 is unset. The protocol's version is one from Nix 2.4 to
// 2.34, but until 2.11 clients had an option enforce-determinism, which was
// on, and newer ones send zero.
func (c *serveConn) asked(o nixproto.BuildOptions) Limits {
	c.beforeSelfHash = o.EnforceDeterminism
	const most = 1 << 31 // seconds; more than any build
	return Limits{
		Timeout:    time.Duration(min(o.Timeout, most)) * time.Second,
		MaxSilent:  time.Duration(min(o.MaxSilentTime, most)) * time.Second,
		MaxLogSize: int64(min(o.MaxLogSize, 1<<62)),
	}
}

// building is worker.building for this protocol.
func (c *serveConn) building(f func(context.Context, LogSink) error) error {
	ctx, done := c.in.watch(c.ctx, c.abandon)
	defer done()
	err := f(ctx, c.stderr)
	c.stderr.settle(ctx)
	if ctx.Err() != nil {
		return errGone
	}
	return err
}

func (c *serveConn) buildDerivation(q *nixproto.ServeBuildDerivation) (nixproto.Response, error) {
	err := c.mayWrite()
	if err == nil {
		err = c.mayBuild()
	}
	var result *nixproto.BuildResult
	if err == nil {
		req := &BuildRequest{DrvPath: q.DrvPath, Drv: q.Derivation, Limits: c.asked(q.Options)}
		err = c.building(func(ctx context.Context, log LogSink) (err error) {
			result, err = c.server.cfg.Builder.Build(ctx, c.Session, req, log)
			return err
		})
	}
	if err != nil && gone(err) {
		return nil, err
	}
	if err != nil {
		return failedResult(c.Session, err), nil
	}
	return result, nil
}

func (c *serveConn) buildPaths(q *nixproto.ServeBuildPaths) (nixproto.Response, error) {
	if err := c.mayWrite(); err != nil {
		return nil, err
	}
	if err := c.mayRealise(q.Paths); err != nil {
		return nil, err
	}
	var results []nixproto.KeyedBuildResult
	req := &PathsRequest{Paths: q.Paths, Limits: c.asked(q.Options)}
	err := c.building(func(ctx context.Context, log LogSink) (err error) {
		results, err = c.server.cfg.Builder.BuildPaths(ctx, c.Session, req, log)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, r := range results {
		if !r.Status.Success() {
			return &nixproto.ServeBuildStatus{Status: r.Status, Error: failureOf(results).Error()}, nil
		}
	}
	return &nixproto.ServeBuildStatus{Status: nixproto.Built}, nil
}

// exportPaths answers with an export stream of just those paths, references
// first.
func (c *serveConn) exportPaths(paths []nixproto.StorePath) error {
	closure, err := c.Sight.Closure(c.ctx, paths)
	if err != nil {
		return err
	}
	for _, p := range closure {
		if _, wanted := slices.BinarySearch(paths, p); !wanted {
			continue
		}
		if err := c.exportPath(p); err != nil {
			return err
		}
	}
	return nixproto.WriteExportEnd(c.w)
}

func (c *serveConn) exportPath(p nixproto.StorePath) error {
	info, blob, err := c.openPath(p)
	if err != nil {
		return err
	}
	defer closeBlob(c.Session, blob)
	if err := nixproto.WriteExportNext(c.w); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	if err := copyBlob(c.ctx, c.w, blob); err != nil {
		return err
	}
	return nixproto.WriteExportInfo(c.w, info)
}
