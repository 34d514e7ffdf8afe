package server

import (
	"nbd/nixproto"
	"nbd/store"
)

// maxImport is how many paths of an import stream become valid at once: each
// waits on disk until then.
const maxImport = 256

// importPaths takes an import stream, in which each NAR comes before what is
// known of its path, and without its size.
func (c *serveConn) importPaths() (nixproto.Response, error) {
	if err := c.mayWrite(); err != nil {
		return nil, err
	}
	// A stream has no content addresses, so its paths prove nothing.
	if err := c.Client.require(StoreWrite); err != nil {
		return nil, err
	}
	var waiting []store.Registration
	defer func() {
		for _, reg := range waiting {
			reg.Staged.Discard()
		}
	}()
	for {
		more, err := nixproto.ReadExportNext(c.r)
		if err != nil {
			return nil, err
		}
		if len(waiting) == maxImport || !more {
			if err := c.Sight.Register(c.ctx, waiting); err != nil {
				return nil, err
			}
			waiting = nil
		}
		if !more {
			return &nixproto.Done{}, nil
		}
		reg, err := c.importPath()
		if err != nil {
			return nil, err
		}
		waiting = append(waiting, reg)
	}
}

// importPath stages one path of an import stream.
func (c *serveConn) importPath() (_ store.Registration, err error) {
	staged, err := c.server.store.Stage(c.ctx, c.Client.Account.ID)
	if err != nil {
		return store.Registration{}, err
	}
	defer func() {
		if err != nil {
			staged.Discard()
		}
	}()
	if err := staged.ReadNAR(c.r); err != nil {
		return store.Registration{}, err
	}
	if err := staged.Finish(); err != nil {
		return store.Registration{}, err
	}
	info, err := nixproto.ReadExportInfo(c.r)
	if err != nil {
		return store.Registration{}, err
	}
	c.Keep(info.Path)
	return store.Registration{Info: *info, Staged: staged}, nil
}
