module tessera/testcluster/pause

go 1.26.8
