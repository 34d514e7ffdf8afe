package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// handle serves one operation of the worker protocol; stream is what follows
// its request, nil for most. A nil response is none.
func (w *worker) handle(req nixproto.Request, stream *nixproto.FramedReader) (nixproto.Response, error) {
	switch q := req.(type) {
	case *nixproto.AddToStore:
		return w.addToStore(q, stream)
	case *nixproto.AddToStoreNar:
		return nil, w.addToStoreNar(q, stream)
	case *nixproto.AddMultipleToStore:
		return nil, w.addMultipleToStore(q, stream)
	case *nixproto.AddBuildLog:
		return w.addBuildLog(q, stream)
	case *nixproto.BuildDerivation:
		return w.buildDerivation(q)
	case *nixproto.BuildPaths:
		return w.buildPaths(q)
	case *nixproto.BuildPathsWithResults:
		return w.buildPathsWithResults(q)
	case *nixproto.AddSignatures, *nixproto.RegisterDrvOutput, *nixproto.CollectGarbage:
		if err := w.Client.require(StoreWrite); err != nil {
			return nil, err
		}
		return w.change(req)
	case *nixproto.SetOptions: // of the client's own requests
		return w.query(req)
	default:
		if err := w.Client.require(StoreRead); err != nil {
			return nil, err
		}
		return w.query(req)
	}
}

// query serves the operations that change nothing.
func (w *worker) query(req nixproto.Request) (nixproto.Response, error) {
	switch q := req.(type) {
	case *nixproto.QueryPathInfo:
		return w.queryPathInfo(q.Path)
	case *nixproto.IsValidPath:
		valid, err := w.valid([]nixproto.StorePath{q.Path})
		return answer[nixproto.Bool](len(valid) == 1, err)
	case *nixproto.QueryValidPaths:
		valid, err := w.validOrFetched(q.Paths, q.Substitute, w.building)
		return answer[nixproto.PathSet](valid, err)
	case *nixproto.QueryAllValidPaths:
		all, err := w.server.store.All(w.ctx, w.Client.Account.ID)
		return answer[nixproto.PathSet](all, err)
	case *nixproto.QueryReferrers:
		set, err := w.Sight.Referrers(w.ctx, q.Path)
		return answer[nixproto.PathSet](set, aboutPath(q.Path, err))
	case *nixproto.QueryValidDerivers:
		set, err := w.server.store.ValidDerivers(w.ctx, w.Client.Account.ID, q.Path)
		return answer[nixproto.PathSet](set, err)
	case *nixproto.QueryDeriver:
		info, err := w.info(q.Path)
		if err != nil {
			return nil, err
		}
		return answer[nixproto.OptionalPath](nixproto.OptionalPath(info.Deriver), nil)
	case *nixproto.QueryPathFromHashPart:
		p, err := w.Sight.ByHashPart(w.ctx, q.HashPart)
		if errors.Is(err, store.ErrNotFound) {
			p, err = "", nil
		}
		return answer[nixproto.OptionalPath](nixproto.OptionalPath(p), err)
	case *nixproto.QueryRealisation:
		return w.queryRealisation(q)
	case *nixproto.QueryDerivationOutputMap:
		outputs, err := w.server.cfg.Builder.OutputMap(w.ctx, w.Session, q.Path)
		return answer[nixproto.OutputMap](outputs, aboutPath(q.Path, err))
	case *nixproto.QueryMissing:
		missing, err := w.server.cfg.Builder.Missing(w.ctx, w.Session, q.Paths)
		if err != nil {
			return nil, err
		}
		return missing, nil
	case *nixproto.VerifyStore:
		bad, err := w.verifyStore(q.CheckContents)
		return answer[nixproto.Bool](nixproto.Bool(bad), err)
	default:
		return w.minor(req)
	}
}

// minor serves the operations to which this server has little to say.
func (w *worker) minor(req nixproto.Request) (nixproto.Response, error) {
	switch q := req.(type) {
	case *nixproto.SetOptions:
		w.maxSilent = time.Duration(min(q.MaxSilentTime, 1<<31)) * time.Second
		return nil, nil
	case *nixproto.AddTempRoot:
		w.Keep(q.Path)
		return &nixproto.Done{}, nil
	case *nixproto.EnsurePath:
		return w.ensurePath(q.Path)
	case *nixproto.SyncWithGC, *nixproto.OptimiseStore: // equal bytes are stored once anyway
		return &nixproto.Done{}, nil
	case *nixproto.FindRoots: // there are none but what sessions and builds use
		return &nixproto.Roots{}, nil
	case *nixproto.QuerySubstitutablePaths:
		return w.querySubstitutablePaths(q.Paths)
	case *nixproto.QuerySubstitutablePathInfos:
		return w.querySubstitutablePathInfos(q.Paths)
	case *nixproto.AddIndirectRoot, *nixproto.AddPermRoot:
		return nil, refusef("this server keeps no roots for its clients: %s is not supported", req.Op())
	default:
		return nil, refusef("%s is not supported by this server", req.Op())
	}
}

// change serves short operations that change the account's view.
func (w *worker) change(req nixproto.Request) (nixproto.Response, error) {
	switch q := req.(type) {
	case *nixproto.AddSignatures:
		return &nixproto.Done{}, w.addSignatures(q)
	case *nixproto.RegisterDrvOutput:
		if _, err := q.Realisation.CheckSignatures(w.trustedKeys()); err != nil {
			return nil, refusef("%v", err)
		}
		err := w.server.store.AddRealisation(w.ctx, w.Client.Account.ID, &q.Realisation)
		return nil, aboutPath(q.Realisation.OutPath, err)
	case *nixproto.CollectGarbage:
		return w.collectGarbage(q)
	default:
		return nil, refusef("%s is not supported by this server", req.Op())
	}
}

// A response is a pointer to a type that answers some operation.
type response[T any] interface {
	*T
	nixproto.Response
}

// answer makes a value the response of its operation, unless there is an error.
func answer[T any, P response[T]](v T, err error) (nixproto.Response, error) {
	if err != nil {
		return nil, err
	}
	return P(&v), nil
}

// aboutPath makes "not there" the sentence that clients know.
func aboutPath(p nixproto.StorePath, err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return notValid(p)
	}
	return err
}

// valid returns those of the paths that are valid, and keeps them until the
// session ends.
func (ss *session) valid(paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	ss.Keep(paths...) // before asking, so that none goes in between
	return ss.Sight.Valid(ss.ctx, paths)
}

// info returns what is known of a valid path.
func (ss *session) info(p nixproto.StorePath) (*nixproto.PathInfo, error) {
	info, err := ss.Sight.Info(ss.ctx, p)
	return info, aboutPath(p, err)
}

// queryPathInfo is asked for each path of a closure, one after the other.
func (w *worker) queryPathInfo(p nixproto.StorePath) (nixproto.Response, error) {
	info, err := w.Sight.Info(w.ctx, p)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	if err != nil {
		return &nixproto.OptionalPathInfo{}, nil
	}
	if w.v < nixproto.MaxWorker {
		info = plainSelfAddress(info)
	}
	if info, err = w.vouch(info); err != nil {
		return nil, err
	}
	return &nixproto.OptionalPathInfo{Info: info}, nil
}

// plainSelfAddress hides the content address of a path that refers to itself
// from a client that may be an old one. Releases of Nix hash such content in
// two ways (2.8 adds where the references are, 2.26 does not), and each refuses
// an address made in the other; without it the path is one like any other.
// Only clients of the newest protocol version are known to be new; the serve
// protocol does not tell.
func plainSelfAddress(info *nixproto.PathInfo) *nixproto.PathInfo {
	if info.CA == "" || !slices.Contains(info.References, info.Path) {
		return info
	}
	plain := *info
	plain.CA = ""
	return &plain
}

func (w *worker) queryRealisation(q *nixproto.QueryRealisation) (nixproto.Response, error) {
	r, err := w.Sight.Realisation(w.ctx, q.DrvHash, q.OutputName)
	if errors.Is(err, store.ErrNotFound) {
		return &nixproto.RealisationSet{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &nixproto.RealisationSet{*r}, nil
}

// collectGarbage deletes from the account's own view. What this session was
// told is valid does not hold back what it wants deleted.
func (w *worker) collectGarbage(q *nixproto.CollectGarbage) (nixproto.Response, error) {
	id := w.Client.Account.ID
	w.leases.Release()
	w.leases = w.Sight.NewLease()
	var result store.GCResult
	var err error
	switch {
	case q.Action == nixproto.GCDeleteSpecific:
		if len(q.Paths) > 0 {
			result, err = w.server.store.Delete(w.ctx, id, q.Paths...)
		}
	case q.Action == nixproto.GCDeleteDead && q.MaxFreed == 0:
	default:
		opts := store.GCOptions{Live: q.Action == nixproto.GCReturnLive, DryRun: q.Action == nixproto.GCReturnDead}
		if q.Action == nixproto.GCDeleteDead && q.MaxFreed != 1<<64-1 {
			opts.MaxFreed = q.MaxFreed
		}
		result, err = w.server.store.GC(w.ctx, id, opts)
	}
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(result.Paths))
	for i, p := range result.Paths {
		paths[i] = string(p)
	}
	return &nixproto.Collected{Paths: paths, Freed: result.Freed}, nil
}

func (w *worker) addBuildLog(q *nixproto.AddBuildLog, stream *nixproto.FramedReader) (nixproto.Response, error) {
	if err := w.Client.require(StoreWrite); err != nil {
		return nil, err
	}
	if err := w.checkStorage(w.ctx, 0); err != nil {
		return nil, err
	}
	if err := w.server.store.PutLog(w.ctx, w.Client.Account.ID, q.DrvPath.Base(), &countedLog{r: stream, s: w.Session, ctx: w.ctx}); err != nil {
		return nil, err
	}
	return &nixproto.Done{}, stream.Finish()
}

// A countedLog is a log whose bytes count for max-storage while they are read: as
// much as they would take if they did not compress, until they are counted anew.
type countedLog struct {
	r    io.Reader
	s    *Session
	ctx  context.Context
	left int // bytes that are counted already
}

// logStride is how many bytes of a log are counted at once.
const logStride = 1 << 20

// Read implements io.Reader.
func (l *countedLog) Read(p []byte) (int, error) {
	if l.left == 0 {
		if err := l.s.checkStorage(l.ctx, logStride); err != nil {
			return 0, err
		}
		l.left = logStride
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// limits are those of the session's requests.
func (w *worker) limits() Limits { return Limits{MaxSilent: w.maxSilent} }

// buildDerivation is the build hook's request. A build that cannot be is a
// result, like one that failed: clients show its text best.
func (w *worker) buildDerivation(q *nixproto.BuildDerivation) (nixproto.Response, error) {
	if err := w.mayBuild(); err != nil {
		return failedResult(w.Session, err), nil
	}
	var result *nixproto.BuildResult
	err := w.building(func(ctx context.Context, log LogSink) (err error) {
		req := &BuildRequest{DrvPath: q.DrvPath, Drv: q.Derivation, Mode: q.Mode, Limits: w.limits()}
		result, err = w.server.cfg.Builder.Build(ctx, w.Session, req, log)
		return err
	})
	if err != nil && !gone(err) {
		return failedResult(w.Session, err), nil
	}
	if err != nil {
		return nil, err
	}
	return result, nil
}

// building calls f with the log of one operation, and with a context that ends
// when the client leaves.
func (w *worker) building(f func(context.Context, LogSink) error) error {
	ctx, done := w.in.watch(w.ctx, w.abandon)
	defer done()
	log := &workerLog{out: w.out, ids: w.ids}
	defer log.close()
	err := f(ctx, log)
	if ctx.Err() != nil {
		return errGone
	}
	return err
}

func (w *worker) buildPathsWithResults(q *nixproto.BuildPathsWithResults) (nixproto.Response, error) {
	results, err := w.realise(q.Paths, q.Mode)
	return answer[nixproto.BuildResults](results, err)
}

// buildPaths has one answer for all paths: the first failure is an error that
// names how many there were.
func (w *worker) buildPaths(q *nixproto.BuildPaths) (nixproto.Response, error) {
	results, err := w.realise(q.Paths, q.Mode)
	if err != nil {
		return nil, err
	}
	return &nixproto.Done{}, failureOf(results)
}

// failureOf returns nil if all results are successes.
func failureOf(results []nixproto.KeyedBuildResult) error {
	var texts []string
	for _, r := range results {
		if !r.Status.Success() {
			texts = append(texts, r.Error)
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return &refusal{msg: strings.Join(texts, "\n")}
}

// realise makes derived paths valid.
func (w *worker) realise(paths []nixproto.DerivedPath, mode nixproto.BuildMode) (results []nixproto.KeyedBuildResult, err error) {
	if err := w.mayRealise(paths); err != nil {
		return nil, err
	}
	err = w.building(func(ctx context.Context, log LogSink) (err error) {
		req := &PathsRequest{Paths: paths, Mode: mode, Limits: w.limits()}
		results, err = w.server.cfg.Builder.BuildPaths(ctx, w.Session, req, log)
		return err
	})
	return results, err
}

// mayBuild reports why the client may not have anything built now.
func (ss *session) mayBuild() error {
	if err := ss.Client.require(BuildWrite); err != nil {
		return err
	}
	return ss.checkStorage(ss.ctx, 0)
}

// mayRealise asks for the permission to build only if something could have to
// be built: clients that copy a path make it valid first.
func (ss *session) mayRealise(paths []nixproto.DerivedPath) error {
	for _, p := range paths {
		if p.Built() {
			return ss.mayBuild()
		}
	}
	return ss.Client.require(StoreRead)
}

// verifyStore looks whether the account's view is what it should be, with its
// contents if asked, and reports whether anything is wrong.
func (w *worker) verifyStore(contents bool) (bad bool, err error) {
	if !contents {
		return false, nil // the index is checked by the operator's check
	}
	ctx, done := w.in.watch(w.ctx, w.abandon)
	defer done()
	log := &workerLog{out: w.out, ids: w.ids}
	defer log.close()
	all, err := w.server.store.All(ctx, w.Client.Account.ID)
	if err != nil {
		return false, err
	}
	for _, p := range all {
		problem, err := w.verifyPath(ctx, p)
		if err != nil {
			return bad, err
		}
		if problem != "" {
			bad = true
			w.Log.Error("path damaged", "path", p, "problem", problem)
			log.Note(fmt.Sprintf("path '%s' %s", p, problem))
		}
	}
	return bad, nil
}

// verifyPath reads a path's content; problem is "" if all is well.
func (w *worker) verifyPath(ctx context.Context, p nixproto.StorePath) (problem string, err error) {
	info, err := w.server.store.Info(ctx, w.Client.Account.ID, p)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil // deleted meanwhile
	}
	if err != nil {
		return "", err
	}
	blob, err := w.server.store.OpenBlob(ctx, info.NarHash)
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDamaged) {
		return "has lost its content", nil
	}
	if err != nil {
		return "", err
	}
	defer closeBlob(w.Session, blob)
	h := nixproto.NewHasher(nixproto.SHA256)
	if err := copyBlob(ctx, h, blob); err != nil {
		return "", err
	}
	if nixproto.HashFromSum(nixproto.SHA256, h) != info.NarHash {
		return "was modified", nil
	}
	return "", nil
}
