# Lua, compiled by tcc against musl, in three derivations: what `contrib/demo`
# has stock Nix build on nbd. Everything comes from Debian's archive: `debs`
# and `sources` are folders that contrib/demo fills, `tools` holds a static busybox.
{ debs, sources, tools, salt ? "", system ? "x86_64-linux" }:
let
  only = dir: prefix: builtins.path {
    path = dir + "/${builtins.head (builtins.filter
      (n: builtins.substring 0 (builtins.stringLength prefix) n == prefix)
      (builtins.attrNames (builtins.readDir dir)))}";
    name = prefix;
  };
  shell = "${builtins.path { path = tools; name = "busybox"; }}/busybox";
  run = name: attrs: script: derivation (attrs // {
    inherit name system salt;
    builder = shell;
    args = [ "sh" "-euc" ''
      mkdir -p /build/bin
      for a in $(${shell} --list); do ln -s ${shell} /build/bin/$a; done
      export PATH=/build/bin
      ${script}
    '' ];
  });

  # tcc itself is linked against glibc, so it is started by that glibc's own
  # loader; what it makes is linked against musl and static.
  compiler = run "tcc-musl" { } ''
    mkdir -p $out/bin $out/debian
    for deb in ${only debs "libc6_"} ${only debs "tcc_"} ${only debs "musl-dev_"} ${only debs "make_"}; do
      dpkg-deb -x $deb $out/debian
    done
    lib=$out/debian/lib/x86_64-linux-gnu
    [ -e $lib ] || lib=$out/debian/usr/lib/x86_64-linux-gnu
    musl=$out/debian/usr
    for tool in make tcc; do
      program=$out/debian/usr/bin/$tool
      [ -e $program ] || program=$out/debian/usr/bin/x86_64-linux-gnu-$tool
      printf '#!${shell} sh\nexec %s/ld-linux-x86-64.so.2 --library-path %s %s "$@"\n' $lib $lib $program > $out/bin/$tool
    done
    cat > $out/bin/cc <<END
    #!${shell} sh
    # A musl target for tcc: its own headers first, then musl's; static unless only compiling.
    case " \$* " in *" -c "*) link= ;; *) link="$musl/lib/x86_64-linux-musl/crt1.o $musl/lib/x86_64-linux-musl/crti.o" ;; esac
    if [ -z "\$link" ]; then
      exec $out/bin/tcc -B$musl/lib/x86_64-linux-gnu/tcc -nostdinc -I$musl/lib/x86_64-linux-gnu/tcc/include -I$musl/include/x86_64-linux-musl "\$@"
    fi
    exec $out/bin/tcc -B$musl/lib/x86_64-linux-gnu/tcc -static -nostdlib -nostdinc -I$musl/lib/x86_64-linux-gnu/tcc/include -I$musl/include/x86_64-linux-musl \
      \$link "\$@" $musl/lib/x86_64-linux-musl/libc.a $musl/lib/x86_64-linux-gnu/tcc/libtcc1.a $musl/lib/x86_64-linux-musl/crtn.o
    END
    chmod +x $out/bin/*
  '';

  source = run "lua-source" { } ''
    mkdir $out
    tar -xzf ${only sources "lua5.4_"} -C $out --strip-components 1
  '';
in
run "lua" { } ''
  cp -r ${source} lua && chmod -R u+w lua && cd lua/src
  ${compiler}/bin/make -j$NIX_BUILD_CORES CC=${compiler}/bin/cc AR="${compiler}/bin/tcc -ar rcs" RANLIB=true \
    CFLAGS="-O2 -Wall -DLUA_COMPAT_5_3 -DLUA_USE_POSIX" LIBS= lua
  ./lua -e 'assert(2^53 == 9007199254740992.0); print(_VERSION .. " runs")'
  mkdir -p $out/bin
  cp lua $out/bin/
''
